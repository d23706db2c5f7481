"""Each measure on sources small enough to count by hand."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from structure_imports import circles, import_graph
from structure_measures import (
    Source,
    any_count,
    class_sizes,
    docstrings,
    load,
    long_functions,
    repeated_defaults,
    sizes,
    undocumented,
    wide_functions,
)
from structure_remote import notes, remote_calls, remote_types, revealing, verdict

ROOT = Path(__file__).parent.parent.parent


def source(text: str, path: str = "a/b.py") -> Source:
    return Source.of(path, textwrap.dedent(text))


def test_lines_with_and_without_blanks_and_comments() -> None:
    one = source('"""Of a file."""\n\n# Why.\nx = 1  # What.\n\n')
    assert one.lines == 5
    assert one.code_lines == 2


def test_sizes_are_of_files() -> None:
    files = [source("x = 1\n" * length, f"a/{length}.py") for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)]
    measured = sizes(files, named=2)
    assert (measured.median, measured.p90) == (5.5, 100)
    assert measured.largest == [(100, "a/100.py"), (9, "a/9.py")]


@pytest.mark.parametrize(("body", "found"), [(59, []), (60, [(61, "a/b.py C.method")])])
def test_long_functions_are_counted_from_def_to_the_last_line(body: int, found: list[tuple[int, str]]) -> None:
    text = "class C:\n    @property\n    def method(self):\n" + "        x = 1\n" * body
    assert long_functions([source(text)]) == found


def test_a_long_function_inside_a_function_has_both_names() -> None:
    text = "def outer():\n    async def inner():\n" + "        x = 1\n" * 60
    assert [place for _, place in long_functions([source(text)])] == ["a/b.py outer", "a/b.py outer.inner"]


@pytest.mark.parametrize(
    ("signature", "number"),
    [
        ("self, a, b, c, d, e, f", None),
        ("self, a, b, c, d, e, f, g", 7),
        ("cls, a, /, b, c, *, d, e, f, g, h", 8),
        ("a, b, c, d, e, f, *args, **kwargs", None),
    ],
)
def test_wide_functions(signature: str, number: int | None) -> None:
    expected = [] if number is None else [(number, "a/b.py make")]
    assert wide_functions([source(f"def make({signature}): ...")]) == expected


def test_any_counts_uses_and_not_its_import() -> None:
    text = """
        from __future__ import annotations
        import typing
        from typing import Any

        def f(x: Any, y: dict[str, Any]) -> list[typing.Any]:
            '''Any is no use here.'''
            return any(x)
    """
    assert any_count(source(text)) == 3


def test_classes_have_lines_methods_and_what_is_assigned_to_self() -> None:
    text = """
        class Small:
            x: int = 1

        class Large:
            def __init__(self, other):
                self.a, self.b = 1, 2
                other.c = 3
            def step(self):
                self.a += self.b
                self.d: int = 4
    """
    large, small = class_sizes([source(text)])
    assert (large.lines, large.methods, large.attributes) == (7, 2, 3)
    assert (small.lines, small.methods, small.attributes) == (2, 0, 0)
    assert large.place == "a/b.py Large"


def test_undocumented_names_are_public_and_not_overrides() -> None:
    text = '''
        class C:
            """Said."""
            def bare(self): ...
            def said(self):
                """Said."""
                def inner(): ...
            @override
            def overridden(self): ...
            def _private(self): ...
            def __len__(self): ...
        class _Private:
            def bare(self): ...
        async def alone(): ...
    '''
    assert undocumented([source(text)]) == (["a/b.py C.bare", "a/b.py alone"], 4)


def test_docstrings_are_those_of_classes_and_functions() -> None:
    text = '"""Module."""\nclass _C:\n    """See it."""\n    def f(self):\n        """Two."""\n        "no docstring"\n'
    assert docstrings(source(text)) == ["See it.", "Two."]


CONFIG = source(
    """
    class Node: ...
    class Pool(Node):
        size: int = 3
        rate: float = Field(0.5, ge=0)
        name: str = Field(default="x")
        shares: bool = False
        rest: dict = Field(default_factory=dict)
        limit: int | None = None
    """,
    "lib/config/pools.py",
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(size=3): ...", ["a/b.py:1 size = 3"]),
        ("def f(other, *, rate: float = 0.5): ...", ["a/b.py:1 rate = 0.5"]),
        ("class C:\n    name: str = field(default='x')", ["a/b.py:2 name = 'x'"]),
        ("pool = given or Pool()", []),
        ("def f(size=4, length=3, shares=False, limit=None): ...", []),
        ("pool = Pool(size=4)", []),
        ("class Options(Node):\n    size: int = 3", []),
        ("class Mine(Options):\n    size: int = 3\nclass Options(Node): ...", []),
        ("class Options(Node):\n    steps: int = 9\ndef f(steps=9): ...", ["a/b.py:3 steps = 9"]),
    ],
)
def test_defaults_are_repeated_by_name_and_value(text: str, found: list[str]) -> None:
    assert repeated_defaults([CONFIG, source(text)]) == found


def test_circles_count_imports_inside_functions_but_not_packages_that_reexport() -> None:
    files = [
        source("from a.one import f", "a/__init__.py"),
        source("import os\nfrom a import two", "a/one.py"),
        source("def f():\n    from a.three import g", "a/two.py"),
        source("import a.one", "a/three.py"),
        source("from a import one", "a/four.py"),
    ]
    assert import_graph(files)["a.one"] == {"a.two"}
    assert circles(import_graph(files)) == [["a.one", "a.three", "a.two"]]
    assert circles(import_graph([*files[:3], files[4]])) == []


CALLS = """
    actor = ray.remote(Cls).options(
        name="x",
    ).remote(1)
    ref, other = actor.f.remote(actor.g.remote("ä")), remote(2)
"""


def test_remote_calls_are_calls_of_something_but_ray() -> None:
    assert [call.func.lineno for call in remote_calls(source(CALLS))] == [2, 5, 5]


def test_what_is_revealed_is_the_callee_and_no_line_moves() -> None:
    revealed = revealing(source(CALLS))
    assert revealed.splitlines()[1:] == [
        "actor = reveal_type(ray.remote(Cls).options(",
        '    name="x",',
        ").remote)(1)",
        'ref, other = reveal_type(actor.f.remote)(reveal_type(actor.g.remote)("ä")), remote(2)',
    ]


@pytest.mark.parametrize(
    ("revealed", "kind"),
    [
        ("Any", "untyped"),
        ("def (*args: Any, **kwargs: Any) -> ray.actor.ActorHandle[a.Cls]", "untyped"),
        ("def (int | ObjectRef[int]) -> ObjectRef[tuple[int, Any]]", "partly"),
        ("def (int | ObjectRef[int]) -> ObjectRef[AnyOf]", "typed"),
        ("def () -> ObjectRef[numpy.ndarray[tuple[Any, ...], numpy.dtype[numpy.generic[Any]]]]", "typed"),
        ("def () -> ObjectRef[numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]]", "partly"),
    ],
)
def test_verdicts(revealed: str, kind: str) -> None:
    assert verdict(revealed) == kind


def test_notes_are_read_with_and_without_columns() -> None:
    output = 'a/b.py:3: note: Revealed type is "Any"\na/b.py:4:9: note: Revealed type is "int"\na/b.py:5: error: x'
    assert list(notes(output)) == [("a/b.py", 3, "Any"), ("a/b.py", 4, "int")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[tool.mypy]\npackages = ['a']\nstrict = true\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").write_text("")
    (tmp_path / "a" / "calls.py").write_text(
        textwrap.dedent("""
        from typing import Any

        class Method:
            def remote(self, x: int) -> str: ...

        class Loose:
            def remote(self, x: dict[str, Any]) -> str: ...

        def f(one: Method, two: Any, three: Loose) -> None:
            one.remote(1)
            two.remote(1)
            three.remote({})
        """)
    )
    return tmp_path


def test_mypy_judges_the_calls_of_a_checkout(checkout: Path) -> None:
    kinds, places = remote_types(checkout)
    assert kinds == {"typed": 1, "untyped": 1, "partly": 1}
    assert places == ["a/calls.py:12 untyped", "a/calls.py:13 partly"]
    assert "reveal_type" not in (checkout / "a" / "calls.py").read_text()


def test_only_packages_that_are_type_checked_are_measured(checkout: Path) -> None:
    (checkout / "other").mkdir()
    (checkout / "other" / "x.py").write_text("x = 1")
    assert [one.path for one in load(checkout)] == ["a/calls.py"]


def test_the_command_measures_any_checkout(checkout: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "structure.py")]
    done = subprocess.run([*command, "--json", str(checkout)], capture_output=True, text=True, check=True)
    rows = {row["label"]: row["value"] for row in json.loads(done.stdout)[str(checkout)]}
    assert rows["files"] == 1
    assert rows["Any"] == 2
    assert rows["calls across processes"] == 3
    shown = subprocess.run([*command, str(checkout), str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert f"{checkout}: circles" not in shown
    assert shown.splitlines()[1].split()[:2] == ["files", "1"]

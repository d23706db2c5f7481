"""Every example in a docstring runs, and prints what it says."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("euphonium", "actors", "reward_servers", "learners", "orchestrator")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def examples() -> Iterator[tuple[str, str, str]]:
    """Module, place and text of every docstring with an example; files without one are not imported for it."""
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        text = path.read_text()
        if ">>>" not in text:
            continue
        file = path.relative_to(ROOT)
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(text)):
            docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if docstring is not None and ">>>" in docstring:
                yield module, f"{file}:{getattr(node, 'name', 'module')}", docstring


def run(docstring: str, names: dict[str, object], place: str) -> str:
    """What doctest has to say against an example; empty if it holds."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(docstring, names, place, place, 0)
    doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    return "".join(said)


EXAMPLES = list(examples())


@pytest.mark.parametrize(("module", "place", "docstring"), EXAMPLES, ids=[place for _, place, _ in EXAMPLES])
def test_the_example_holds(module: str, place: str, docstring: str) -> None:
    torch.manual_seed(0)
    said = run(docstring, dict(vars(importlib.import_module(module))), place)
    assert not said, said


def test_an_example_that_does_not_hold_is_reported() -> None:
    assert "Got:\n    2" in run("Adds.\n\n>>> 1 + 1\n3\n", {}, "here")


def test_examples_are_found() -> None:
    places = {place for _, place, _ in EXAMPLES}
    assert "euphonium/dynamics/step_table.py:StepTable" in places

"""What can be counted in the sources of a checkout: sizes, `Any`, docstrings, defaults that are written twice.

Pure functions over :class:`Source`: files are parsed, never imported, so that a checkout of any age can be measured.
"""

from __future__ import annotations

import ast
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FUNCTION_LINES = 60
PARAMETERS = 6
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: relative to the checkout, with slashes.
        text: its contents.
        tree: the same, parsed.
    """

    path: str
    text: str
    tree: ast.Module = field(repr=False)

    @classmethod
    def of(cls, path: str, text: str) -> Source:
        """Parses a file."""
        return cls(path, text, ast.parse(text, path))

    @property
    def lines(self) -> int:
        """All lines, blank ones and comments too."""
        return len(self.text.splitlines())

    @property
    def code_lines(self) -> int:
        """Lines that are neither blank nor a comment alone; docstrings count."""
        return sum(1 for line in map(str.strip, self.text.splitlines()) if line and not line.startswith("#"))

    @property
    def in_config(self) -> bool:
        """Whether it belongs to the package that owns the defaults."""
        return "config" in self.path.split("/")[:-1]


def load(checkout: Path) -> list[Source]:
    """All files that are not empty, of the packages that the checkout's own pyproject.toml has type-checked."""
    packages = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    files = sorted(path for package in packages for path in (checkout / package).rglob("*.py"))
    texts = ((path.relative_to(checkout).as_posix(), path.read_text()) for path in files)
    return [Source.of(path, text) for path, text in texts if text.strip()]


@dataclass(frozen=True)
class Sizes:
    """Lines a file.

    Attributes:
        median: the middle one.
        p90: nine files of ten are not longer than this one.
        largest: the longest files, as ``(lines, path)``, longest first.
    """

    median: float
    p90: int
    largest: list[tuple[int, str]]


def sizes(sources: list[Source], *, named: int) -> Sizes:
    """Distribution of lines over files, with the names of the longest."""
    lines = sorted(source.lines for source in sources)
    longest = sorted(((source.lines, source.path) for source in sources), reverse=True)
    return Sizes(statistics.median(lines), lines[int(0.9 * len(lines))], longest[:named])


def functions(source: Source) -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name, methods and nested ones too."""
    yield from _functions_under(source.tree, "")


def _functions_under(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        named = isinstance(child, Function | ast.ClassDef)
        yield from _functions_under(child, f"{prefix}{child.name}." if named else prefix)


def function_lines(node: Function) -> int:
    """From ``def`` to its last line, docstring included, decorators not."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> int:
    """Parameters without ``self``, ``cls``, ``*args`` and ``**kwargs``; those with a keyword only count as well."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def long_functions(sources: list[Source]) -> list[tuple[int, str]]:
    """Functions of more than 60 lines as ``(lines, place)``, longest first."""
    found = [(function_lines(node), f"{s.path} {name}") for s in sources for name, node in functions(s)]
    return sorted((one for one in found if one[0] > FUNCTION_LINES), reverse=True)


def wide_functions(sources: list[Source]) -> list[tuple[int, str]]:
    """Functions of more than 6 parameters as ``(parameters, place)``, most first."""
    found = [(parameters(node), f"{s.path} {name}") for s in sources for name, node in functions(s)]
    return sorted((one for one in found if one[0] > PARAMETERS), reverse=True)


def any_count(source: Source) -> int:
    """How often the name ``Any`` is used, in annotations and elsewhere; the line that imports it does not count."""
    return sum(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
        for node in ast.walk(source.tree)
    )


@dataclass(frozen=True, order=True)
class ClassSize:
    """A class.

    Attributes:
        lines: from ``class`` to its last line.
        methods: functions in its body, ``__init__`` and properties too.
        attributes: names that its methods assign to ``self``; fields of a dataclass are not among them.
        place: file and name.
    """

    lines: int
    methods: int
    attributes: int
    place: str

    def __str__(self) -> str:
        return f"{self.lines} lines, {self.methods} methods, {self.attributes} attributes: {self.place}"


def class_sizes(sources: list[Source]) -> list[ClassSize]:
    """All classes, the longest first."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                methods = [one for one in node.body if isinstance(one, Function)]
                attributes = {name for method in methods for name in _assigned_to_self(method)}
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append(ClassSize(lines, len(methods), len(attributes), f"{source.path} {node.name}"))
    return sorted(found, reverse=True)


def _assigned_to_self(method: Function) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                yield node.attr


def public_definitions(source: Source) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Classes, functions and methods whose names, and whose classes' names, do not begin with an underscore.

    Left out are functions inside functions, and methods that say ``@override``: the overridden one documents them.
    """
    yield from _public_under(source.tree.body, "")


def _public_under(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not {"override", "overload"} & {ast.unparse(one).split(".")[-1] for one in node.decorator_list}:
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _public_under(node.body, f"{prefix}{node.name}.")


def undocumented(sources: list[Source]) -> tuple[list[str], int]:
    """Public definitions without a docstring, and how many public definitions there are."""
    public = [(f"{s.path} {name}", node) for s in sources for name, node in public_definitions(s)]
    return [place for place, node in public if ast.get_docstring(node) is None], len(public)


def docstrings(source: Source) -> list[str]:
    """Docstrings of all classes and functions of a file, of private ones too."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(source.tree) if isinstance(node, kinds))
    return [text for text in found if text is not None]


def sections(sources: list[Source]) -> set[str]:
    """Names of the configuration's classes: all in its package, and those elsewhere that derive from them."""
    classes = [(s.in_config, node) for s in sources for node in ast.walk(s.tree) if isinstance(node, ast.ClassDef)]
    found = {node.name for in_config, node in classes if in_config}
    while derived := {node.name for _, node in classes if _derives(node, found)} - found:
        found |= derived
    return found


def _derives(node: ast.ClassDef, bases: set[str]) -> bool:
    return any(isinstance(base, ast.Name) and base.id in bases for base in node.bases)


def repeated_defaults(sources: list[Source]) -> list[str]:
    """Defaults of the configuration that are written once more elsewhere, as places.

    Counted are parameters and fields outside the configuration with the name and the literal default of one of its
    fields. None, False, 0 and empty strings stand for nothing rather than for a choice, and do not count. A default
    under another name is not found; two things that share a name and a value by chance are: the list wants reading.
    A section that is constructed from its defaults (``PoolConfig()``) reads them and repeats none.
    """
    owners = sections(sources)
    known: dict[str, list[object]] = {}
    others = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                of_config = node.name in owners and (source.in_config or _derives(node, owners))
                for name, value, line in _field_defaults(node):
                    if of_config:
                        known.setdefault(name, []).append(value)
                    else:
                        others.append((source, name, value, line))
            elif isinstance(node, Function) and not source.in_config:
                others += [(source, *default) for default in _parameter_defaults(node)]
    found = [f"{s.path}:{line} {name} = {value!r}" for s, name, value, line in others if value in known.get(name, [])]
    return sorted(found)


def _field_defaults(node: ast.ClassDef) -> Iterator[tuple[str, object, int]]:
    """``name: type = literal`` in the body of a class; also ``= Field(literal, ...)`` and ``field(default=...)``."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            value: ast.expr | None = item.value
            if isinstance(value, ast.Call):
                given = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
                value = next(iter([*value.args, *given]), None)
            yield from _literal(item.target.id, value, item.lineno)


def _parameter_defaults(node: Function) -> Iterator[tuple[str, object, int]]:
    positional = [*node.args.posonlyargs, *node.args.args]
    tail = positional[len(positional) - len(node.args.defaults) :]
    pairs = [*zip(tail, node.args.defaults, strict=True)]
    for argument, value in [*pairs, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]:
        yield from _literal(argument.arg, value, argument.lineno)


def _literal(name: str, value: ast.expr | None, line: int) -> Iterator[tuple[str, object, int]]:
    try:
        literal = None if value is None else ast.literal_eval(value)
    except ValueError:
        return
    if literal:
        yield name, literal, line

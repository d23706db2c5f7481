"""Calls across processes (``handle.method.remote(...)``), and whether mypy knows what they take and answer."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from structure_measures import Source, load

NOTE = re.compile(r'^(?P<path>[^:]+):(?P<line>\d+)(:\d+)?: note: Revealed type is "(?P<type>.*)"$')
# How numpy writes "of any shape" and "of any precision"; there is no narrower way to say them.
OF_NUMPY = re.compile(r"numpy\.ndarray\[tuple\[Any, \.\.\.\]|numpy\.(generic|number|integer|inexact|floating)\[Any\]")
KINDS = ("typed", "partly", "untyped")
HEAVY = shutil.ignore_patterns("*.safetensors", "*.png", "__pycache__")


def remote_calls(source: Source) -> list[ast.Call]:
    """Every call of something's ``remote``: tasks, actors' methods, and starts of actors.

    ``ray.remote(Class)`` is none: it makes a class into an actor's and calls nobody.
    """
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and _is_remote(node.func)]


def _is_remote(callee: ast.expr) -> bool:
    if not isinstance(callee, ast.Attribute) or callee.attr != "remote":
        return False
    return not (isinstance(callee.value, ast.Name) and callee.value.id == "ray")


def revealing(source: Source) -> str:
    """The file with ``reveal_type(...)`` around what each of :func:`remote_calls` calls; no line moves."""
    lines = [line.encode() for line in source.text.splitlines(keepends=True)]
    marks: list[tuple[int, int, bytes]] = []
    for call in remote_calls(source):
        callee = call.func
        marks.append((callee.lineno, callee.col_offset, b"reveal_type("))
        marks.append((callee.end_lineno or 0, callee.end_col_offset or 0, b")"))
    for line, column, text in sorted(marks, reverse=True):
        lines[line - 1] = lines[line - 1][:column] + text + lines[line - 1][column:]
    return b"".join(lines).decode()


def verdict(revealed: str) -> str:
    """``untyped``, ``partly`` or ``typed``, by the type of what is called.

    Untyped is ``Any``, or a function that takes any arguments; partly typed is one whose arguments or answer have an
    ``Any`` in them, other than the shape and the precision of an array.
    """
    if revealed == "Any" or "*args: Any" in revealed:
        return "untyped"
    return "partly" if re.search(r"\bAny\b", OF_NUMPY.sub("", revealed)) else "typed"


def notes(output: str) -> Iterator[tuple[str, int, str]]:
    """``(path, line, type)`` of the notes in mypy's output."""
    for line in output.splitlines():
        if found := NOTE.match(line):
            yield found["path"], int(found["line"]), found["type"]


def remote_types(checkout: Path) -> tuple[Counter[str], list[str]]:
    """Has mypy look at a copy of the checkout, with its own settings. Takes a minute or more.

    Returns:
        How many calls there are of each :func:`verdict`, and the places of those that are not typed. A call that mypy
        did not look at, as it is in code that is never reached, is untyped.
    """
    sources = load(checkout)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        shutil.copy(checkout / "pyproject.toml", copy)
        for package in {source.path.split("/")[0] for source in sources}:
            shutil.copytree(checkout / package, copy / package, ignore=HEAVY)
        calls = {source.path: remote_calls(source) for source in sources}
        for source in sources:
            if calls[source.path]:
                (copy / source.path).write_text(revealing(source))
        command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "--no-pretty"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    told: dict[tuple[str, int], str] = {}
    for path, line, revealed in notes(done.stdout):
        # Of several calls in a line, or several readings of one, the worst counts for all.
        told[path, line] = max(told.get((path, line), KINDS[0]), verdict(revealed), key=KINDS.index)
    if not told and any(calls.values()):
        raise RuntimeError(f"mypy told nothing of {checkout}: {(done.stdout + done.stderr)[-2000:]}")
    found, places = Counter(dict.fromkeys(KINDS, 0)), []
    for path, line in ((path, call.func.lineno) for path, several in calls.items() for call in several):
        kind = told.get((path, line), KINDS[-1])
        found[kind] += 1
        if kind != "typed":
            places.append(f"{path}:{line} {kind}")
    return found, places

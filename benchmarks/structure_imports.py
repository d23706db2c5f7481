"""Which file imports which, and where imports run in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from structure_measures import Source

Graph = dict[str, set[str]]


def module_name(path: str) -> str:
    """``a/b/c.py`` as ``a.b.c``, ``a/b/__init__.py`` as ``a.b``."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph(sources: list[Source]) -> Graph:
    """Files as modules, with the modules of ours that each imports; imports inside functions count.

    ``from a.b import c`` leads to ``a.b.c`` where that is a module, else to ``a.b``. That importing ``a.b.c`` runs
    ``a/__init__.py`` too is not an edge: a package that re-exports its modules would always be a circle.
    """
    known = {module_name(source.path) for source in sources}
    return {
        module_name(source.path): {
            target for target in _targets(source.tree, known) if target != module_name(source.path)
        }
        for source in sources
    }


def _targets(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules each of which reaches all others of its group; sorted."""
    reached = {start: _reachable(graph, start) for start in graph}
    groups = {
        frozenset(other for other in reached[start] if start in reached[other]) | {start}
        for start in graph
        if start in reached[start]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Graph, start: str) -> set[str]:
    """Modules that an import of ``start`` leads to; ``start`` only if it is on a circle."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(graph[module])
    return found

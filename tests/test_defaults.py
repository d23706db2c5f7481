"""Every default of the application stands once: in ``euphonium/config``, or in a reward's options."""

import ast
from collections.abc import Iterator
from pathlib import Path

import euphonium.config
from euphonium.config import Node

ROOT = Path(__file__).parent.parent
PACKAGES = ("euphonium", "actors", "reward_servers", "learners", "orchestrator")
ALLOWED = {
    ("*", "seed"): "every seed is that of something else",
}


def tree_defaults() -> dict[str, list[object]]:
    """Defaults of the tree by the name of the field."""
    found: dict[str, list[object]] = {}
    for kind in vars(euphonium.config).values():
        if isinstance(kind, type) and issubclass(kind, Node):
            for name, field in kind.model_fields.items():
                if not field.is_required():
                    found.setdefault(name, []).append(field.get_default(call_default_factory=True))
    return found


def declared(node: ast.AST, outer: str = "") -> Iterator[tuple[str, str, ast.expr]]:
    """Owner, name and default of the parameters of public functions, and of the fields of classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name.startswith("_") and child.name != "__init__":
                continue
            arguments = child.args
            by_place = [*arguments.posonlyargs, *arguments.args]
            defaults = [None] * (len(by_place) - len(arguments.defaults)) + arguments.defaults
            for argument, default in zip(
                [*by_place, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True
            ):
                if default is not None:
                    yield f"{outer}{child.name}", argument.arg, default
        elif isinstance(child, ast.ClassDef):
            # Options of rewards belong to the tree: the only place of what they declare.
            if child.name.endswith("Options"):
                continue
            for line in child.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                    yield child.name, line.target.id, line.value
            yield from declared(child, f"{child.name}.")


def repeats(source: str) -> list[tuple[str, str]]:
    """Owners and names whose default is that of a field of the same name."""
    known, found = tree_defaults(), []
    for owner, name, default in declared(ast.parse(source)):
        try:
            value = ast.literal_eval(default)
        except ValueError:  # an expression, not a value
            continue
        same = any(type(other) is type(value) and other == value for other in known.get(name, ()))
        # None and False are no setting but its absence.
        if same and value is not None and value is not False and not {(owner, name), ("*", name)} & ALLOWED.keys():
            found.append((owner, name))
    return found


def test_no_signature_repeats_a_default_of_the_tree() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.is_relative_to(ROOT / "euphonium" / "config"):
                assert repeats(path.read_text()) == [], path.relative_to(ROOT)


def test_a_repeat_would_be_found() -> None:
    source = """
class Rule:
    ddof: int = 1
    clip: float = 4.0

    def __init__(self, weight, num_steps=30, *, clip: float = 5.0, every=None): ...

async def draw(deadline_s=600.0, seed=0): ...
"""
    assert repeats(source) == [
        ("Rule", "ddof"), ("Rule.__init__", "num_steps"), ("Rule.__init__", "clip"), ("draw", "deadline_s"),
    ]  # fmt: skip

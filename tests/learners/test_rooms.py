"""Imports inside the learners: engine <- {policy, rewards}, and DeepSpeed in the engine's folder alone."""

import ast
from pathlib import Path

LEARNERS = Path(__file__).parents[2] / "learners"


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_only_the_engine_knows_deepspeed() -> None:
    knowing = {p.parent.name for p in LEARNERS.rglob("*.py") if any(n.startswith("deepspeed") for n in imported(p))}
    assert knowing == {"engine"}


def test_policy_and_reward_models_share_the_engine_and_nothing_else() -> None:
    for room, others in (("engine", ("policy", "rewards")), ("policy", ("rewards",)), ("rewards", ("policy",))):
        for path in (LEARNERS / room).glob("*.py"):
            wrong = {name for name in imported(path) for other in others if name.startswith(f"learners.{other}")}
            assert not wrong, f"{path.relative_to(LEARNERS)} imports {wrong}"

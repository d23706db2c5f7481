"""Imports point one way: dynamics <- core <- models <- {actors, reward_servers, learners} <- orchestrator."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "dynamics": set(),
    "core": {"dynamics"},
    "models": {"dynamics", "core"},
    "actors": {"dynamics", "core", "models"},
    "reward_servers": {"dynamics", "core", "models"},
    "learners": {"dynamics", "core", "models"},
    "orchestrator": {"dynamics", "core", "models", "actors", "reward_servers", "learners"},
}
LEAVES = {"tests", "benchmarks", "deploy"}


def imported(path: Path) -> set[str]:
    """Top-level names of all imports of a file, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    ours = set(ALLOWED) | LEAVES
    for path in files:
        wrong = (imported(path) & ours) - ALLOWED[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_dynamics_needs_torch_alone() -> None:
    standard = set(sys.stdlib_module_names) | {"dynamics", "torch"}
    for path in (ROOT / "dynamics").rglob("*.py"):
        assert imported(path) <= standard, path


def test_only_learners_and_their_launcher_know_deepspeed_and_ray_train() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            if package != "learners":
                assert "deepspeed" not in imported(path), path


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from orchestrator.cli import app; "
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'deepspeed'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr

"""Imports point one way: euphonium <- {actors, reward_servers, learners} <- orchestrator."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "euphonium": set(),
    "actors": {"euphonium"},
    "reward_servers": {"euphonium"},
    "learners": {"euphonium"},
    "orchestrator": {"euphonium", "actors", "reward_servers", "learners"},
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


def library_parts(path: Path) -> set[str]:
    """Parts of the library that a file imports, ``from euphonium.config import ...`` as ``config``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.append(node.module)
        names |= {module.split(".")[1] for module in modules if module.startswith("euphonium.")}
    return names


# Inside the library; the modules beside its packages import nothing of ours but each other.
LIBRARY = {
    "dynamics": set(),
    "config": {"dynamics", "errors", "text_files"},
    "wire": {"config", "errors", "files", "role_logs"},
    "generators": {
        "config",
        "dynamics",
        "errors",
        "files",
        "prompt_files",
        "text_files",
        "weight_files",
        "wire",
    },
    "rewards": {
        "config",
        "dynamics",
        "errors",
        "files",
        "generators",
        "prompt_files",
        "text_files",
        "weight_files",
        "wire",
    },
    "embedded": {
        "config",
        "dynamics",
        "errors",
        "files",
        "generators",
        "prompt_files",
        "rewards",
        "text_files",
        "wire",
    },
}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    ours = set(ALLOWED) | LEAVES
    for path in files:
        wrong = (imported(path) & ours) - ALLOWED[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("part", LIBRARY)
def test_the_parts_of_the_library_import_one_way_too(part: str) -> None:
    for path in sorted((ROOT / "euphonium" / part).rglob("*.py")):
        wrong = library_parts(path) - LIBRARY[part] - {part}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_dynamics_needs_torch_alone() -> None:
    standard = set(sys.stdlib_module_names) | {"euphonium", "torch"}
    for path in (ROOT / "euphonium" / "dynamics").rglob("*.py"):
        assert imported(path) <= standard, path
        assert library_parts(path) <= {"dynamics"}, path


def test_only_learners_know_deepspeed() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            if package != "learners":
                assert "deepspeed" not in imported(path), path


def heavy_after(arguments: list[str], heavy: set[str]) -> set[str]:
    """Which of some libraries a command has imported when it is done."""
    code = (
        "import contextlib, io, sys; from orchestrator.commands.cli import run_command\n"
        f"with contextlib.redirect_stdout(io.StringIO()): status = run_command({arguments!r})\n"
        f"print(*({heavy!r} & set(sys.modules))); sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


RUNNING = {"ray", "deepspeed", "tensorboardX", "prometheus_client", "grpc", "wandb", "mlflow", "swanlab"}


def test_help_needs_no_heavy_library() -> None:
    heavy = RUNNING | {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pydantic", "yaml", "PIL"}
    assert heavy_after(["--help"], heavy) == set()


@pytest.mark.parametrize(
    "module", ["orchestrator.learning.mailbox", "euphonium.wire.weights.store", "orchestrator.desk",
               "euphonium.wire.balancer"],
)  # fmt: skip
def test_actors_that_compute_nothing_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr or "imports torch"


def test_what_checks_a_recipe_needs_nothing_that_only_runs_need() -> None:
    recipe = "recipes/embedded/euphonium-sage.yaml"
    assert heavy_after(["validate", recipe], RUNNING | {"torch", "diffusers"}) == {"torch", "diffusers"}

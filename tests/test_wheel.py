"""The wheel: what a user without a checkout needs is in it, and the shipped recipes run from anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orchestrator.commands.cli import run_command
from tests.checkout import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the committed files and those that are about to be, not from what lies beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], text=True, capture_output=True
    ).stdout.split("\n")
    tops = ("euphonium/", "actors/", "reward_servers/", "learners/", "orchestrator/", "recipes/")
    for name in listed:
        source = ROOT / name
        if name in ("pyproject.toml", "README.md", "LICENSE") or (name.startswith(tops) and source.is_file()):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*build, str(folder), str(folder / "source")], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("euphonium-*.whl")
    return found


def test_everything_that_runs_is_in_the_wheel(wheel: Path) -> None:
    inside = {name.partition(".data/data/")[2] or name for name in zipfile.ZipFile(wheel).namelist()}
    tops = ("euphonium", "actors", "reward_servers", "learners", "orchestrator")
    for top in tops:
        for file in (ROOT / top).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert str(file.relative_to(ROOT)) in inside
    for file in (ROOT / "recipes").rglob("*.*"):
        if file.is_file():
            assert f"share/euphonium/{file.relative_to(ROOT)}" in inside
    assert not [name for name in inside if name.startswith(("tests", "benchmarks", "runs"))]


def test_recipes_run_from_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["recipes", str(tmp_path / "mine")]) == 0
    assert run_command(["recipes", str(tmp_path / "mine")]) == 2
    assert "nothing is overwritten" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path / "mine")
    for recipe in ("euphonium-sage", "dancegrpo"):
        assert run_command(["validate", f"recipes/embedded/{recipe}.yaml", "prompts.embeddings=null"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    for file in (ROOT / "recipes").rglob("*.yaml"):
        assert (tmp_path / "mine" / file.relative_to(ROOT)).is_file()

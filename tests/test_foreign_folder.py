"""A run from a folder with packages of its own: ours are not replaced, and the rewards in it are found everywhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from euphonium.config import RunConfig

ROOT = Path(__file__).parent.parent
REWARD = '''
"""Notes who scores, and from where the libraries of this name come."""

import json
import os
from pathlib import Path

import euphonium


class MyReward:
    def __init__(self):
        self.note("made")

    def score(self, videos, prompts):
        self.note("asked")
        return videos.float().mean(dim=(1, 2, 3, 4))

    def note(self, what):
        line = json.dumps({"what": what, "pid": os.getpid(), "library": euphonium.__file__})
        with Path(__file__).with_name("notes.jsonl").open("a") as file:
            file.write(line + "\\n")
'''


@pytest.fixture
def folder(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """A checkout of somebody else's, with a recipe that uses its ``models/my_reward.py``."""
    for package in ("core", "dynamics"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise ImportError('the {package} of somebody else')\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "my_reward.py").write_text(REWARD)
    tiny_recipe_file(tmp_path)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["rewards"]["outcome"].append({"name": "mine", "type": "models.my_reward:MyReward"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


MODULE = (sys.executable, "-m", "orchestrator")
# What `euphonium` on the path is: Python puts the script's folder on its path, not the working directory.
SCRIPT = (str(Path(sys.executable).with_name("euphonium")),)


def command(folder: Path, *arguments: str, program: Sequence[str] = MODULE) -> tuple[int, str]:
    """Runs the command line in a folder; answers its process id and output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*program, *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert process.returncode == 0, output
    return process.pid, output


def notes(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "models" / "notes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("program", [MODULE, SCRIPT], ids=["module", "console script"])
def test_the_driver_finds_the_folders_reward_and_our_library(folder: Path, program: Sequence[str]) -> None:
    _, output = command(folder, "validate", "recipe.yaml", program=program)
    assert "models.my_reward:MyReward" in output
    assert {note["library"] for note in notes(folder)} == {str(ROOT / "euphonium" / "__init__.py")}


@pytest.mark.ray
@pytest.mark.slow
def test_the_actors_of_a_run_find_them_too(folder: Path) -> None:
    driver, output = command(folder, "train", "recipe.yaml", "iterations=1", "evaluation.clips=0")
    assert "iteration 1/1" in output
    found = notes(folder)
    assert driver in {note["pid"] for note in found if note["what"] == "made"}
    asked = {note["pid"] for note in found if note["what"] == "asked"}
    assert asked
    assert driver not in asked
    assert {note["library"] for note in found} == {str(ROOT / "euphonium" / "__init__.py")}
    (record,) = [r for r in map(json.loads, (folder / "runs/tiny/metrics.jsonl").open()) if r["iteration"] == 1]
    assert 0 <= record["reward/mine/mean"] <= 1

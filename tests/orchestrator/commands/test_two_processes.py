"""Two terminals, one run: the second is turned away in one line, and the first does not notice."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from euphonium.config import RunConfig, dump_config
from tests.process import Process


def assert_turned_away(first: Process, place: Path, *arguments: str) -> None:
    began = time.monotonic()
    second = Process(*arguments)
    assert second.finish() == 3, second.output
    (line,) = second.lines
    assert f"{place} is being written to by process {first.popen.pid} on " in line or f"{place}, beside which" in line
    assert f"process {first.popen.pid} on " in line
    assert "(euphonium train" in line
    assert time.monotonic() - began < 60


@pytest.mark.ray
def test_a_run_that_runs_is_not_started_again(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_recipe_file(tmp_path, "iterations=6", "checkpoint.every=2", "evaluation.clips=0")
    recipe = tmp_path / "resolved.yaml"
    recipe.write_text(dump_config(config))
    run = config.run_dir
    first = Process("train", str(recipe))
    first.wait_for(f"run tiny: {run}")
    # Nothing is written yet.
    assert_turned_away(first, run, "train", str(recipe), "resume=never")
    first.wait_for("iteration 3/6")
    assert (run / "checkpoints" / "step_000002").is_dir()
    for resume in ("auto", "never"):
        assert_turned_away(first, run, "train", str(recipe), f"resume={resume}")
    assert first.finish() == 0, first.output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(7))
    assert (run / "export" / "model_index.json").is_file()
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny"]


def test_a_reward_models_training_has_its_folder_and_its_target_to_itself(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path
) -> None:
    tiny_recipe_file(tmp_path)
    overrides = [
        f"output_dir={tmp_path / 'runs'}", f"target={tmp_path / 'model'}", f"prompts.train={tmp_path / 'train.txt'}",
        f"prompts.evaluation={tmp_path / 'held_out.txt'}", "blocks=1", "optimizer.updates=100000",
        "optimizer.evaluate_every=100000", "optimizer.checkpoint_every=1",
    ]  # fmt: skip
    command = ("train-prm", "recipes/embedded/prm.yaml", *overrides)
    first = Process(*command, "name=one")
    first.wait_for("train: ")
    try:
        assert_turned_away(first, tmp_path / "model", *command, "name=two")
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".one.lock", "one"]
    finally:
        first.popen.kill()
    assert first.popen.wait() == -9
    # Whoever was killed keeps nobody out.
    second = Process(*command, "name=one", "optimizer.updates=2")
    second.wait_for("train: ")
    second.popen.kill()

"""Two terminals, one run: the second is turned away in one line, and the first does not notice."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from euphonium.config import RunConfig, dump_config
from euphonium.locks import writing_alone
from orchestrator.commands.cli import run_command
from tests.process import Process

# Roles that a lock has nothing to do with take long to start.
FEW_PROCESSES = ("rewards.process=null", "sampler.guidance=null", "pools.rollout.num_actors=1",
                 "pools.learner.num_workers=1")  # fmt: skip


def assert_turned_away(first: Process, place: Path, *commands: tuple[str, ...]) -> None:
    began = time.monotonic()
    for second in [Process(*command) for command in commands]:
        assert second.finish() == 3, second.output
        (line,) = second.lines
        named = (f"{place} is being written to by process {first.popen.pid} on ", f"{place}, beside which")
        assert any(name in line for name in named), line
        assert f"process {first.popen.pid} on " in line
        assert "(euphonium train" in line
    assert time.monotonic() - began < 60


def test_a_run_of_another_process_is_not_started(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_recipe_file(tmp_path)
    for resume in ("auto", "never"):
        with writing_alone([(config.run_dir, "output_dir")]):
            assert run_command(["train", str(tmp_path / "recipe.yaml"), f"resume={resume}"]) == 3
        assert (
            f"output_dir: {config.run_dir} is being written to by process {os.getpid()} on " in capfd.readouterr().err
        )
    assert not config.run_dir.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_runs_is_not_started_again(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_recipe_file(
        tmp_path, "iterations=4", "checkpoint.every=1", "evaluation.every=4", "evaluation.clips=0", *FEW_PROCESSES
    )
    recipe = tmp_path / "resolved.yaml"
    recipe.write_text(dump_config(config))
    run = config.run_dir
    first = Process("train", str(recipe))
    first.wait_for(f"run tiny: {run}")
    # Nothing is written yet.
    assert_turned_away(first, run, ("train", str(recipe), "resume=never"))
    first.wait_for("iteration 2/4")
    assert (run / "checkpoints" / "step_000001").is_dir()
    assert_turned_away(first, run, *(("train", str(recipe), f"resume={resume}") for resume in ("auto", "never")))
    assert first.finish() == 0, first.output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(5))
    assert (run / "export" / "model_index.json").is_file()
    assert sorted(path.name for path in run.parent.iterdir()) == [".prometheus", "tiny"]


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
        assert_turned_away(first, tmp_path / "model", (*command, "name=two"))
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".one.lock", "one"]
    finally:
        first.popen.kill()
    assert first.popen.wait() == -9
    # Whoever was killed keeps nobody out.
    with writing_alone([(tmp_path / "runs" / "one", "output_dir"), (tmp_path / "model", "target")]):
        pass

"""Folders of runs, written by what writes them in a run."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from euphonium.config import RunConfig, dump_config
from euphonium.wire.records import Videos
from orchestrator.evaluation import SampleFolder
from orchestrator.report.recorded import SAMPLES
from orchestrator.report.tracking import METRICS_FILE
from orchestrator.state.checkpoints import RESOLVED
from tests.conftest import tiny_recipe

PROMPTS = ['a <red> car & a "bus"', "a blue fish"]


def write_run(place: Path, iterations: int, **more: float) -> Path:
    """Writes the folder of a run, ``runs/tiny``, whose held-out total rises by a hundredth an iteration."""
    recipe = tiny_recipe(Path("generator"), Path("prm"), place) | {"iterations": iterations}
    config = RunConfig.model_validate(recipe)
    folder = config.run_dir
    folder.mkdir(parents=True)
    (folder / RESOLVED).write_text(dump_config(config))
    records: list[Mapping[str, float]] = [
        {"iteration": 0, "policy_version": 0, "eval/icon/mean": 0.3, "eval/total/mean": 0.4}
    ]
    for i in range(1, iterations + 1):
        records.append(
            {"iteration": i, "policy_version": i, "reward/icon/mean": 0.3 + i / 50, "policy/ratio_deviation": 1e-8,
             "eval/icon/mean": 0.3 - i / 50, "eval/total/mean": 0.4 + i / 100, "busy/rollout": 0.9,
             "busy/learner": 0.2, "pool/rollout": 2.0, "pool/learner": 2.0, "time/iteration_s": 3.0,
             "policy/grad_norm": 0.5, "rollout/samples": 6.0, "guidance/gain": 0.5, "guidance/gain_error": 0.1, **more}
        )  # fmt: skip
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_clips(folder: Path, iteration: int, seed: int) -> None:
    """Writes clips of an evaluation as a run does."""
    save_clips(folder, iteration, np.random.default_rng(seed).integers(0, 255, (2, 3, 16, 16, 3), dtype=np.uint8))


def save_clips(folder: Path, iteration: int, videos: Videos) -> None:
    """Saves clips ``[2, frames, height, width, 3]`` of an evaluation as a run does."""
    SampleFolder(folder / SAMPLES).save(iteration, PROMPTS, videos, {"icon": np.array([0.25, 0.5]) + iteration})

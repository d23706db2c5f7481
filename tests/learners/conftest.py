"""Trains on two real ZeRO-3 ranks, for the tests that compare them with a plain loop."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig, dump_config
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.wire.records import GroupPayload, GroupTask
from tests.ranks import run_ranks

ITERATIONS, GROUPS = 2, 3


def draw_groups(config: RunConfig) -> list[tuple[list[GroupPayload], list[np.ndarray]]]:
    worker = RolloutWorker(config, torch.device("cpu"))
    assert config.rewards.process is not None
    prm = ProcessRewardModel.load(Path(config.rewards.process.path), config.model)
    prompts = ["a red car moving left on a white background", "a blue fish moving up on a gray background"]
    rng = np.random.default_rng(0)
    iterations = []
    for i in range(ITERATIONS):
        payloads, advantages = [], []
        for g in range(GROUPS):
            task = GroupTask(group_id=g, prompt=prompts[g % 2], seed=100 * i + g)
            payloads.append(worker.generate(task, lambda c, table, v: LocalRewards(prm, c, table.sigmas))[2])
            advantages.append(rng.standard_normal((config.rollout.group_size, 4)).astype(np.float32))
        iterations.append((payloads, advantages))
    return iterations


@pytest.fixture(scope="session")
def drawn() -> Callable[[RunConfig], list[tuple[list[GroupPayload], list[np.ndarray]]]]:
    """Draws the groups of two iterations with a recipe."""
    return draw_groups


@pytest.fixture(scope="module")
def train_on_two_ranks(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Draws groups with recipes, trains on them at world size 2, and returns what each rank holds after one of them.

    Arguments are the recipe's name, and the overrides of all that one start of the ranks trains, by name.
    """
    done: dict[str, dict[str, Any]] = {}

    def train(name: str, recipes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        if name not in done:
            prepared = {other: prepare(*overrides) for other, overrides in recipes.items()}
            worker = Path(__file__).with_name("engine") / "zero3_worker.py"
            run_ranks(2, worker, *(folder for folder, *_ in prepared.values()), timeout_s=500)
            for other, (folder, config, iterations) in prepared.items():
                ranks = [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in (0, 1)]
                done[other] = {"config": config, "iterations": iterations, "ranks": ranks}
        return done[name]

    def prepare(*overrides: str) -> tuple[Path, RunConfig, list[tuple[list[GroupPayload], list[np.ndarray]]]]:
        folder = tmp_path_factory.mktemp("ranks")
        config = tiny_recipe_file(folder, *overrides)
        (folder / "recipe.yaml").write_text(dump_config(config))
        iterations = draw_groups(config)
        (folder / "groups.pkl").write_bytes(pickle.dumps(iterations))
        return folder, config, iterations

    return train

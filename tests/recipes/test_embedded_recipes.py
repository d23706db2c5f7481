"""Every embedded recipe trains: two iterations in one process, with the shipped generator."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_process import SingleProcess

from euphonium.config import ModelConfig, load_config
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from euphonium.wire.records import TrainingGroup
from learners.policy.batching import load_rows, plan_updates
from learners.policy.objective import References, evaluate_objective

RECIPES = sorted(p for p in Path("recipes/embedded").glob("*.yaml") if p.name not in ("base.yaml", "prm.yaml"))


@pytest.fixture(scope="module")
def process_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generator's own first blocks under a fresh head: finite rewards and gradients, whatever they mean."""
    folder = tmp_path_factory.mktemp("prm")
    torch.manual_seed(1)
    config = ModelConfig(path="euphonium/embedded/weights", frames=9, height=32, width=32, max_prompt_tokens=16)
    ProcessRewardModel.from_generator(open_generator(config), blocks=3).save(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_embedded_recipe_trains(path: Path, process_reward_model: Path) -> None:
    overrides = ["iterations=2", "rollout.prompts_per_iteration=2", "rollout.group_size=4", "evaluation.prompts=2"]
    config = load_config(path, overrides + small(path, process_reward_model))
    run = SingleProcess(config)
    before = [parameter.detach().clone() for parameter in run.parameters]
    for _ in range(config.iterations):
        metrics = run.iterate()
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert metrics["policy/grad_norm"] > 0
    after = torch.cat([p.detach().flatten() for p in run.parameters])
    assert torch.isfinite(after).all()
    if config.objective.kl is not None:
        assert_penalty_counts_the_distance(run, before)
    moved = [not torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True)]
    assert sum(moved) > len(moved) / 2


def assert_penalty_counts_the_distance(run: Any, before: list[torch.Tensor]) -> None:
    """The recipe's KL between the trained policy and the one before."""
    config, family = run.config, run.worker.family
    task = run.prompts.task(run.groups, config.iterations)
    info, _, payload = run.worker.generate(task, run._source if run.prm else None)
    group = TrainingGroup(
        info=info,
        advantages=np.zeros((1, config.rollout.group_size, config.sampler.num_steps), dtype=np.float32),
        samples=np.arange(config.rollout.group_size),
        counted=config.rollout.group_size,
    )
    batch = plan_updates([(group.rows, group.states)], 1, 16, 1)[0][0][0]
    rows = load_rows(batch, group, payload, torch.device("cpu"))
    anchor = copy.deepcopy(run.policy)
    for parameter, old in zip(anchor.parameters(), before, strict=True):
        parameter.data.copy_(old)
    value = evaluate_objective(
        config.objective, run.worker.table(config.iterations),
        lambda x, t, c: family.velocity(run.policy, x, t, c), rows,
        References(anchor=lambda x, t, c: family.velocity(anchor, x, t, c), kl_weight=1.0),
    )  # fmt: skip
    assert torch.isfinite(value.loss)
    assert (value.kl_anchor > 0).all()
    assert torch.isfinite(value.kl_previous).all()


def small(path: Path, process_reward_model: Path) -> list[str]:
    """What has to shrink with the groups, and the process reward model where the recipe has one."""
    config = load_config(path)
    changes = [f"objective.updates_per_iteration={min(2, config.objective.updates_per_iteration)}"]
    if config.advantage.best_of is not None:
        changes.append(f"advantage.best_of={min(2, config.advantage.best_of)}")
    if config.rewards.process is not None:
        changes.append(f"rewards.process.path={process_reward_model}")
    return changes

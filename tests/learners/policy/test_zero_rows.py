"""Rows whose advantage is 0 are not computed: the gradient is that of all rows."""

import dataclasses

import numpy as np
import pytest
import torch

from euphonium.config import ObjectiveConfig
from euphonium.dynamics import StepTable
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.policy.batching import load_rows, plan_updates
from learners.policy.objective import References, evaluate_objective
from tests.learners.groups import training_group
from tests.learners.policy.test_equal_states import CPU, GROUP, Counting, Field, drawn

OBJECTIVES = (
    ObjectiveConfig(clip_range=0.5),
    ObjectiveConfig(clip_range=0.5, kind="standard", step_weights="equaliser"),
    ObjectiveConfig(clip_range=0.5, ratio_normalisation=True),
)


def gradient(
    objective: ObjectiveConfig, table: StepTable, groups: list[TrainingGroup], payloads: list[GroupPayload], ranks: int
) -> torch.Tensor:
    """Of an update, averaged over the ranks."""
    moved, other = Field(), Field()
    moved.scale.data += 0.01
    (shares,) = plan_updates([(group.rows, group.states) for group in groups], 1, 3, ranks)
    for share in shares:
        for batch in share:
            rows = load_rows(
                batch, groups[batch.group], payloads[batch.group], CPU, guided_mean=objective.kind == "standard"
            )
            evaluate_objective(objective, table, moved, rows, References(previous=other)).loss.backward()
    assert moved.scale.grad is not None
    return moved.scale.grad / ranks


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["plain", "standard", "ratio norm"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_gradient_is_that_of_all_rows(objective: ObjectiveConfig, ranks: int) -> None:
    rng = np.random.default_rng(0)
    groups, payloads, computed = [], [], []
    for empty in ((), (0, 1, 2, 3, 4), (1, 3), (0,)):
        table, payload = drawn("dance", Field(), Counting(), objective)
        advantages = rng.standard_normal((1, GROUP, table.num_steps)).astype(np.float32)
        advantages[:, list(empty)] = 0
        groups.append(training_group(payload, advantages))
        kept = np.array([i for i in range(GROUP) if i not in empty], dtype=np.int64)
        computed.append(dataclasses.replace(groups[-1], samples=kept))
        payloads.append(payload)
    assert [group.skipped for group in computed] == [n * computed[0].info.transitions for n in (0, 5, 2, 1)]
    whole = gradient(objective, table, groups, payloads, ranks)
    assert float(whole.abs().min()) > 1e-4
    torch.testing.assert_close(gradient(objective, table, computed, payloads, ranks), whole, rtol=1e-6, atol=1e-7)


def test_a_batch_of_zeros_has_the_gradient_zero_of_one_sample() -> None:
    table, payload = drawn("dance", Field(), Counting(), OBJECTIVES[0])
    group = training_group(payload, np.zeros((1, GROUP, table.num_steps), np.float32))
    one = dataclasses.replace(group, samples=group.samples[:1])
    empty = dataclasses.replace(group, samples=group.samples[:0])
    assert gradient(OBJECTIVES[0], table, [one, empty], [payload, payload], ranks=3).tolist() == [0, 0]

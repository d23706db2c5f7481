"""From rewards to what the learner group trains on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from euphonium.config import RunConfig
from euphonium.wire.records import Array, GroupInfo, GroupTask
from orchestrator.groups.credit import Batch, ScoredGroup, assign_credit

REFERENCE: Any = "a reference to arrays"


def scored(number: int, process: Array | None, **scores: list[float]) -> ScoredGroup:
    info = GroupInfo(
        task=GroupTask(group_id=number, prompt="", seed=0), policy_version=7, fingerprint="abc", transitions=4,
        process_rewards=process, seconds={"total": 1.0, "process_reward": 0.0}, payload_bytes=0,
    )  # fmt: skip
    values = {name: np.array(numbers, np.float32) for name, numbers in scores.items()}
    return ScoredGroup(info, REFERENCE, REFERENCE, values, 0.25)


def normal(values: list[float], ddof: int = 1) -> np.ndarray:
    return (np.array(values) - np.mean(values)) / np.std(values, ddof=ddof)


def test_an_action_is_credited_with_the_samples_outcome_and_its_own_process_reward(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config("rewards.process.weight=0.5", "advantage.mode=both", "advantage.clip=100")
    process = np.array([[0, 1, 2, 3], [1, 1, 5, 3], [2, 1, 2, 9]], np.float32)
    group = scored(3, process, icon=[0, 1, 5], motion=[3, 2, 2], quality=[1, 4, 4])
    (trained,), statistics = assign_credit(config, Batch([group], 0, 4, 1.0))
    outcome = normal([0, 1, 5]) + normal([3, 2, 2]) + 0.5 * normal([1, 4, 4])
    # In the second step all samples have the same process reward: nothing is learned from it.
    own = np.stack([normal(process[:, k]) if k != 1 else np.zeros(3) for k in range(4)], axis=1)
    np.testing.assert_allclose(trained.advantages, [outcome[:, None] + 0.5 * own], atol=1e-5)
    assert trained.info is group.info
    assert trained.samples.tolist() == [0, 1, 2]
    assert trained.rows == 3 * 4
    assert statistics["time/scoring_s"] == 0.25


def test_best_of_n_trains_the_extremes_of_each_group_in_the_batchs_order(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config(
        "advantage.best_of=1", "advantage.mode=outcome", "rewards.outcome=[{name: icon, type: sprite_icon}]"
    )
    groups = [scored(5, None, icon=[2, 0, 1]), scored(6, None, icon=[1, 0, 2])]
    trained, _ = assign_credit(config, Batch(groups, 0, 7, 1.0))
    assert [group.info.task.group_id for group in trained] == [5, 6]
    assert [group.samples.tolist() for group in trained] == [[0, 1], [1, 2]]
    assert [group.rows for group in trained] == [8, 8]
    # One number a sample, spread over all steps.
    assert all(group.advantages.shape == (1, 3, 4) for group in trained)
    assert np.ptp(trained[0].advantages, axis=2).max() == 0

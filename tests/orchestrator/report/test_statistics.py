"""Statistics of rewards on data whose answers are known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from euphonium.config import OutcomeRewardConfig, ProcessRewardConfig, RewardsConfig, RunConfig, WatchConfig
from euphonium.dynamics import GroupRewards, group_advantages
from euphonium.errors import RewardError
from euphonium.wire.records import GroupInfo, GroupTask
from orchestrator.groups.credit import advantages
from orchestrator.report.metrics import find_metric
from orchestrator.report.statistics import (
    RewardFailures,
    RewardWatch,
    ordered_pairs,
    process_statistics,
    reward_statistics,
    rollout_statistics,
    within_group_correlation,
)


def f(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_spread_and_correlation_of_rewards() -> None:
    a = [np.array([0.0, 1.0, 2.0], np.float32), np.array([5.0, 5.0, 5.0], np.float32)]
    scores = [{"a": v, "up": 10 + 2 * v, "down": -v} for v in a]
    record = reward_statistics(scores)
    assert (record["reward/a/min"], record["reward/a/max"], record["reward/a/mean"]) == (0, 5, 3)
    assert record["reward/a/zero_spread_groups"] == 1
    assert record["reward/a/group_std"] == pytest.approx(np.std([0, 1, 2]) / 2)
    assert record["correlation/a_vs_up"] == pytest.approx(1)
    assert record["correlation/a_vs_down"] == pytest.approx(-1)
    assert record["correlation/up_vs_down"] == pytest.approx(-1)


def test_correlation_is_within_groups() -> None:
    """Two rewards that rise together from group to group, and disagree in each of them."""
    a, b = f([0, 1, 2], [10, 11, 12]), f([2, 1, 0], [12, 11, 10])
    assert within_group_correlation(a, b) == pytest.approx(-1)
    assert float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) > 0.9
    assert within_group_correlation(a, np.ones_like(a)) == 0
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 50)), rng.standard_normal((1, 50))
    assert within_group_correlation(x, y) == pytest.approx(np.corrcoef(x[0], y[0])[0, 1])


@pytest.mark.parametrize(
    ("process", "totals", "right", "pairs"),
    [
        (f([1, 2, 3]), f([10, 20, 30]), 3, 3),
        (f([3, 2, 1]), f([10, 20, 30]), 0, 3),
        (f([1, 3, 2]), f([10, 20, 30]), 2, 3),
        (f([1, 1, 2]), f([10, 20, 30]), 2.5, 3),
        (f([1, 2, 3]), f([10, 10, 30]), 2, 2),
        (f([1, 2, 3]), f([10, 10 + 1e-9, 30]), 2, 2),
        (f([1, 2, 3]), f([7, 7, 7]), 0, 0),
        # Pairs across groups do not count: the second group is worse, and its process rewards are higher.
        (f([1, 2], [8, 9]), f([10, 20], [0, 1]), 2, 2),
    ],
)
def test_pairwise_accuracy(process: np.ndarray, totals: np.ndarray, right: float, pairs: int) -> None:
    assert ordered_pairs(process, totals) == (right, pairs)


def test_pairwise_accuracy_agrees_with_counting() -> None:
    rng = np.random.default_rng(1)
    process, totals = rng.integers(0, 5, (4, 7)).astype(float), rng.integers(0, 4, (4, 7)).astype(float)
    right, count = 0.0, 0
    for group in range(4):
        for i in range(7):
            for j in range(i):
                if totals[group, i] != totals[group, j]:
                    count += 1
                    product = (totals[group, i] - totals[group, j]) * (process[group, i] - process[group, j])
                    right += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    assert ordered_pairs(process, totals) == (right, count)


def test_the_last_scored_state_counts_where_only_guided_steps_are_scored() -> None:
    process = np.zeros((1, 3, 4), np.float32)
    process[0, :, 1] = [3, 2, 1]
    process[0, :, 2] = [1, 2, 3]
    record = process_statistics(process, f([1, 2, 3]))
    assert record["process/pairwise_accuracy"] == 1
    assert record["process/outcome_correlation"] == pytest.approx(1)
    assert record["process/final_mean"] == 2
    assert record["process/mean"] == 2
    assert process_statistics(np.zeros((1, 3, 4), np.float32), f([1, 2, 3])) == {}
    assert "process/pairwise_accuracy" not in process_statistics(process, f([1, 1, 1]))


def test_every_number_of_an_iteration_is_a_declared_metric(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    rng = np.random.default_rng(0)
    scores = [{n: rng.random(3, np.float32) for n in ("icon", "motion", "quality")} for _ in range(2)]
    seconds = {"velocity": 1.0, "process_reward": 0.5, "total": 2.0}
    infos = [
        GroupInfo(
            task=GroupTask(group_id=i, prompt="p", seed=i), policy_version=0, fingerprint="",
            rows=np.arange(3 * 4).reshape(3, 4),
            process_rewards=rng.random((3, 4), np.float32), seconds=seconds, payload_bytes=0,
        )
        for i in range(2)
    ]  # fmt: skip
    import torch

    rewards = [GroupRewards({n: torch.tensor(v) for n, v in group.items()}) for group in scores]
    record = rollout_statistics(config, infos, scores, group_advantages(rewards, config.advantage_rule()))
    record |= RewardFailures(config.rewards).take()
    record |= RewardWatch(WatchConfig(window=1)).update(1, record, print)
    for key in record:
        find_metric(key)
    assert record["process/pairs"] == 6
    assert find_metric("correlation/icon_vs_motion")[1] == "icon_vs_motion"
    assert {"rewards/failures/icon", "rewards/failures/process", "watch/alarm"} <= set(record)


def test_the_alarm_needs_a_full_window_and_is_said_once() -> None:
    lines: list[str] = []
    watch = RewardWatch(WatchConfig(window=3, min_accuracy=0.6))
    alarms = [
        watch.update(i, {"process/pairwise_accuracy": accuracy}, lines.append).get("watch/alarm")
        for i, accuracy in enumerate([0.8, 0.5, 0.6, 0.5, 0.4, 0.9, 0.9, 0.1], 1)
    ]
    assert alarms == [None, None, 0, 1, 1, 0, 0, 0]
    assert len(lines) == 1
    assert lines[0].startswith("warning: the process reward orders only 53.3% of the policy's sample pairs")
    assert watch.update(9, {}, lines.append) == {}


def test_the_alarm_goes_on_with_a_resumed_run_and_forgets_what_is_done_again() -> None:
    records = [{"iteration": i, "process/pairwise_accuracy": 0.4} for i in (1, 2)] + [{"iteration": 3}]
    lines: list[str] = []
    watch = RewardWatch(WatchConfig(window=3, min_accuracy=0.6), records)
    assert watch.update(4, {"process/pairwise_accuracy": 0.4}, lines.append)["watch/alarm"] == 1
    assert watch.update(2, {"process/pairwise_accuracy": 0.9}, lines.append) == {}
    again = watch.update(4, {"process/pairwise_accuracy": 0.9}, lines.append)
    assert again == {"watch/accuracy": pytest.approx((0.4 + 0.9 + 0.9) / 3), "watch/alarm": 0}


def rewards_config() -> RewardsConfig:
    return RewardsConfig(
        outcome=[
            OutcomeRewardConfig(name="icon", type="sprite_icon"),
            OutcomeRewardConfig(name="safety", type="sprite_quality", on_failure="abort"),
        ],
        process=ProcessRewardConfig(path="nowhere"),
    )


def test_failures_are_counted_by_reward() -> None:
    failures = RewardFailures(rewards_config())
    failures.note(RewardError("no", ["icon"]))
    failures.note(RewardError("no", ["process"]))
    failures.note(RewardError("no", ["process"]))
    failures.note(RewardError("of nobody in particular"))
    wanted = {"rewards/failures/icon": 1, "rewards/failures/safety": 0, "rewards/failures/process": 2}
    assert failures.take() == wanted
    assert failures.take() == dict.fromkeys(wanted, 0)


def test_a_reward_may_stop_the_run() -> None:
    failures = RewardFailures(rewards_config())
    with pytest.raises(RewardError, match="'safety' failed, and its on_failure is abort: the judge is down") as caught:
        failures.note(RewardError("the judge is down", ["icon", "safety"]))
    assert caught.value.rewards == ("safety",)
    assert caught.value.exit_status == 5


def test_groups_without_a_reward_of_weight_0_count_in_everything_else(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(
        "rewards.outcome=[{name: icon, type: sprite_icon}, {name: watched, type: sprite_motion, weight: 0}]"
    )
    whole = {"icon": np.array([0.0, 1.0, 2.0], np.float32), "watched": np.array([2.0, 1.0, 0.0], np.float32)}
    groups = [whole, {"icon": whole["icon"] + 1}]
    infos = [
        GroupInfo(
            task=GroupTask(group_id=i, prompt="a car", seed=i, iteration=0), policy_version=0, fingerprint="",
            rows=np.arange(3).reshape(3, 1), process_rewards=np.ones((3, 4), np.float32),
            seconds={"total": 1.0, "process_reward": 0.0}, payload_bytes=1,
        )
        for i in range(2)
    ]  # fmt: skip
    for scores, missing in ((groups, 1), ([{"icon": g["icon"]} for g in groups], 2), ([whole, whole], 0)):
        results = advantages(config, infos, scores)
        record = rollout_statistics(config, infos, scores, results)
        assert record["rewards/missing/watched"] == missing
        assert record["reward/icon/mean"] == pytest.approx(np.mean([g["icon"] for g in scores]))
        assert ("reward/watched/mean" in record) == (missing < 2)
        assert record["advantage/zero_std_groups"] == 0
        for key in record:
            find_metric(key)
        torch.testing.assert_close(results[0].values[0, :, 0], torch.tensor([-1.0, 0.0, 1.0]))

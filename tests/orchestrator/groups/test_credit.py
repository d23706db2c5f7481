"""What the learner group gets of a batch, against Eq. 16 written out in numpy."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from euphonium.config import RunConfig
from orchestrator.groups.credit import Batch, ScoredGroup, assign_credit, beginning
from orchestrator.report.metrics import find_metric
from tests.orchestrator.groups.scored import process_of, scored, scores_of

MakeConfig = Callable[..., RunConfig]


def batch_of(config: RunConfig, *group_ids: int) -> Batch:
    return Batch([scored(config, group_id) for group_id in group_ids], 0, group_ids[-1] + 1, 1.0)


def standardised(values: np.ndarray, config: RunConfig) -> np.ndarray:
    values = values.astype(np.float64)
    return (values - values.mean(axis=0)) / (values.std(axis=0, ddof=config.advantage.ddof) + config.advantage.eps)


def test_advantages_are_eq_16_for_every_action_of_every_sample(make_config: MakeConfig) -> None:
    config = make_config("advantage.clip=100", "rewards.process.weight=0.7")
    groups, _ = assign_credit(config, batch_of(config, 7, 3))
    assert [group.info.task.group_id for group in groups] == [7, 3]
    for group in groups:
        number = group.info.task.group_id
        scores = scores_of(config, number)
        outcome = sum(r.weight * standardised(scores[r.name], config)[:, None] for r in config.rewards.outcome)
        wanted = outcome + 0.7 * standardised(process_of(config, number), config)
        assert group.advantages.dtype == np.float32
        np.testing.assert_allclose(group.advantages, wanted[None], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(group.samples, np.arange(3))


def test_without_process_rewards_all_actions_of_a_sample_are_credited_alike(make_config: MakeConfig) -> None:
    config = make_config("advantage.mode=outcome", "advantage.clip=100")
    (group,), _ = assign_credit(config, batch_of(config, 4))
    scores = scores_of(config, 4)
    wanted = sum(r.weight * standardised(scores[r.name], config) for r in config.rewards.outcome)
    assert group.advantages.shape == (1, 3, config.sampler.num_steps)
    for k in range(config.sampler.num_steps):
        np.testing.assert_allclose(group.advantages[0, :, k], wanted, rtol=1e-5, atol=1e-6)


def test_a_global_scope_takes_the_spread_over_the_whole_batch(make_config: MakeConfig) -> None:
    config = make_config("advantage.mode=outcome", "advantage.scope=global", "advantage.clip=100")
    groups, _ = assign_credit(config, batch_of(config, 0, 1))
    for group in groups:
        wanted = np.zeros(3)
        for reward in config.rewards.outcome:
            own = scores_of(config, group.info.task.group_id)[reward.name].astype(np.float64)
            both = np.concatenate([scores_of(config, i)[reward.name] for i in (0, 1)]).astype(np.float64)
            spread = both.std(ddof=config.advantage.ddof) + config.advantage.eps
            wanted += reward.weight * (own - own.mean()) / spread
        np.testing.assert_allclose(group.advantages[0, :, 0], wanted, rtol=1e-5, atol=1e-6)


def test_the_samples_to_train_on_travel_with_the_group(make_config: MakeConfig) -> None:
    config = make_config("advantage.mode=outcome", "advantage.best_of=1")
    (group,), _ = assign_credit(config, batch_of(config, 4))
    order = np.argsort(group.advantages[0, :, 0])
    np.testing.assert_array_equal(group.samples, np.sort(order[[0, -1]]))
    assert group.samples.dtype == np.int64
    assert group.advantages.shape[1] == 3, "advantages stay those of all samples"
    assert group.rows == 2 * group.info.transitions


def flat(config: RunConfig, group_id: int, *samples: int) -> ScoredGroup:
    """A group in which these samples get the mean of the others, or all the same if there are no others."""
    group = scored(config, group_id)
    others = [i for i in range(config.rollout.group_size) if i not in samples]
    for values in group.scores.values():
        values[list(samples)] = values[others].mean() if others else 1.0
    return group


OUTCOME = ("advantage.mode=outcome", "sampler.guidance=null", "rewards.process=null")


def test_samples_without_an_advantage_count_in_the_mean_and_are_not_computed(make_config: MakeConfig) -> None:
    config = make_config(*OUTCOME)
    two = make_config(*OUTCOME, "objective.updates_per_iteration=2")
    batch = Batch([scored(config, 0), flat(config, 1, 0, 1, 2)], 0, 2, 1.0)
    groups, numbers = assign_credit(config, batch)
    assert [group.samples.tolist() for group in groups] == [[0, 1, 2], []]
    assert [(group.rows, group.states, group.skipped) for group in groups] == [(6, 6, 0), (6, 0, 6)]
    assert numbers["advantage/skipped_transitions"] == 6
    # The other update would have no group at all.
    groups, numbers = assign_credit(two, batch)
    assert [group.samples.tolist() for group in groups] == [[0, 1, 2], [0]]
    assert numbers["advantage/skipped_transitions"] == 4


def test_a_batch_without_any_advantage_keeps_one_sample(make_config: MakeConfig) -> None:
    config = make_config(*OUTCOME)
    groups, _ = assign_credit(config, Batch([flat(config, i, 0, 1, 2) for i in (0, 1)], 0, 2, 1.0))
    assert [group.samples.tolist() for group in groups] == [[0], []]
    assert sum(group.rows for group in groups) == 12


@pytest.mark.parametrize(
    "override",
    ["objective.kl={anchor: fixed}", "objective.imitate_guidance=0.1", "objective.kl={anchor: fixed, weight: 0}"],
)
def test_what_has_another_gradient_is_computed(make_config: MakeConfig, override: str) -> None:
    config = make_config("advantage.mode=outcome", override)
    groups, numbers = assign_credit(config, Batch([scored(config, 0), flat(config, 1, 0, 1, 2)], 0, 2, 1.0))
    skipped = 6 * ("weight: 0" in override)
    assert numbers["advantage/skipped_transitions"] == skipped
    assert len(groups[1].samples) == 3 * (not skipped)


@pytest.mark.parametrize(
    "overrides",
    [
        ("advantage.best_of=1",),
        ("rollout.group_size=4", "advantage.baseline=strength", "sampler.guidance.strengths=[0, 1]"),
    ],
)
def test_the_first_groups_get_the_advantages_that_they_get_in_the_whole_batch(
    make_config: MakeConfig, overrides: tuple[str, ...]
) -> None:
    config = make_config("advantage.mode=outcome", *overrides)
    if config.rollout.group_size == 4:
        batch = Batch([dataclasses.replace(scored(config, i)) for i in range(3)], 0, 3, 1.0)
        for group in batch.groups:
            rows = np.arange(8).reshape(4, 2)
            object.__setattr__(group, "info", dataclasses.replace(group.info, rows=rows))
    else:
        batch = Batch([scored(config, 0), flat(config, 1, 0, 1, 2), scored(config, 2)], 0, 3, 1.0)
    whole, _ = assign_credit(config, batch)
    for count in (1, 2, 3):
        for first, group in zip(beginning(config, batch.groups[:count]), whole, strict=False):
            np.testing.assert_array_equal(first.advantages, group.advantages)
            np.testing.assert_array_equal(first.samples, group.samples)
            assert first.counted == group.counted


def test_numbers_of_the_batch_are_declared_metrics(make_config: MakeConfig) -> None:
    config = make_config()
    _, numbers = assign_credit(config, batch_of(config, 0, 1))
    assert numbers["time/scoring_s"] == 1.0
    assert numbers["rollout/prm_wait_fraction"] == pytest.approx(0.25)
    icon = np.concatenate([scores_of(config, i)["icon"] for i in (0, 1)])
    assert numbers["reward/icon/mean"] == pytest.approx(icon.mean(), rel=1e-6)
    for key in numbers:
        find_metric(key)


def test_members_are_compared_with_those_that_were_guided_alike(make_config: MakeConfig) -> None:
    config = make_config(
        "advantage.mode=outcome", "advantage.clip=100", "rollout.group_size=6", "sampler.guidance.strengths=[0, 1]",
        "advantage.baseline=strength",
    )  # fmt: skip
    (group,), metrics = assign_credit(config, batch_of(config, 4))
    scores = scores_of(config, 4)
    wanted = np.zeros(6)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        wanted[half] = sum(r.weight * standardised(scores[r.name][half], config) for r in config.rewards.outcome)
    np.testing.assert_allclose(group.advantages[0, :, 0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(group.samples, np.arange(6))
    assert "guidance/gain" not in metrics, "one group has no standard error"


def test_what_guidance_earns_is_measured_in_spreads(make_config: MakeConfig) -> None:
    config = make_config("rollout.group_size=4", "sampler.guidance.strengths=[0, 2]", "sampler.guidance.until=3")
    groups = [scored(config, number) for number in (0, 1)]
    totals = []
    for number, group in enumerate(groups):
        for values in group.scores.values():
            # Unguided members have 0 and 0.2, guided ones more.
            values[:] = np.array([0.0, 1.0 + number, 0.2, 1.2 + number])
        totals.append(sum(r.weight for r in config.rewards.outcome) * (1.0 + number))
    _, metrics = assign_credit(config, Batch(groups, 0, 2, 1.0))
    spread = sum(r.weight for r in config.rewards.outcome) * 0.1
    assert metrics["guidance/gain"] == pytest.approx(np.mean(totals) / spread, rel=1e-4)
    assert metrics["guidance/gain_error"] == pytest.approx(np.std(totals, ddof=1) / np.sqrt(2) / spread, rel=1e-4)
    for name in ("guidance/gain", "guidance/gain_error", "guidance/margin", "guidance/margin_error"):
        assert find_metric(name)


def test_members_are_compared_with_the_unguided_ones(make_config: MakeConfig) -> None:
    config = make_config(
        "advantage.mode=outcome", "advantage.clip=100", "rollout.group_size=6", "sampler.guidance.strengths=[0, 1, 2]",
        "advantage.baseline=unguided",
    )  # fmt: skip
    (group,), _ = assign_credit(config, batch_of(config, 4))
    wanted = np.zeros(6)
    for reward in config.rewards.outcome:
        own = scores_of(config, 4)[reward.name].astype(np.float64)
        spread = own.std(ddof=config.advantage.ddof) + config.advantage.eps
        wanted += reward.weight * (own - own[[0, 3]].mean()) / spread
    np.testing.assert_allclose(group.advantages[0, :, 0], wanted, rtol=1e-5, atol=1e-6)
    assert abs(wanted[[0, 3]].sum()) < 1e-5, "the unguided members unlearn nothing for the guided ones"
    assert abs(wanted.sum()) > 0.1


def test_the_margin_is_that_of_the_strongest_members_over_the_next(make_config: MakeConfig) -> None:
    config = make_config("rollout.group_size=6", "sampler.guidance.strengths=[0, 1, 2]")
    groups = [scored(config, number) for number in (0, 1)]
    for number, group in enumerate(groups):
        for values in group.scores.values():
            values[:] = np.array([0.0, 1.0, 3.0 + number, 0.2, 1.2, 3.2 + number])
    _, metrics = assign_credit(config, Batch(groups, 0, 2, 1.0))
    # All members of a strength are 0.2 apart: a spread of 0.1. Strength 2 is 2 and 3 above strength 1.
    assert metrics["guidance/margin"] == pytest.approx(25, rel=1e-4)
    assert metrics["guidance/margin_error"] == pytest.approx(np.std([20, 30], ddof=1) / np.sqrt(2), rel=1e-4)
    assert metrics["guidance/gain"] == pytest.approx((1 + 3 + 1 + 4) / 4 * 10, rel=1e-4)


@pytest.mark.parametrize("baseline", ["strength", "unguided"])
def test_once_guidance_has_ended_members_are_an_ordinary_group(make_config: MakeConfig, baseline: str) -> None:
    mixed = ("advantage.mode=outcome", "rollout.group_size=6", "sampler.guidance.strengths=[0, 1]")
    ended = make_config(*mixed, f"advantage.baseline={baseline}", "sampler.guidance.until=1")
    batch = batch_of(ended, 4)
    batch.groups[0] = dataclasses.replace(
        batch.groups[0],
        info=dataclasses.replace(
            batch.groups[0].info, task=dataclasses.replace(batch.groups[0].info.task, iteration=1)
        ),
    )
    (group,), _ = assign_credit(ended, batch)
    (ordinary,), _ = assign_credit(make_config(*mixed), batch)
    np.testing.assert_array_equal(group.advantages, ordinary.advantages)

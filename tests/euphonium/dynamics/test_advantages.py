import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from euphonium.dynamics import AdvantageRule, GroupRewards, group_advantages
from euphonium.dynamics.advantages import normalise


def rewards(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (6,), generator=torch.Generator().manual_seed(seed))


def rule_of(weights: dict[str, float], **settings: object) -> AdvantageRule:
    usual = {
        "process_weight": 0.0, "scope": "group", "ddof": 1, "eps": 1e-8, "clip": 5.0, "combine": "advantages",
    }  # fmt: skip
    return AdvantageRule(weights=weights, **(usual | settings))  # type: ignore[arg-type]


def one(outcome: dict[str, Tensor], process: Tensor | None = None, **options: object) -> Tensor:
    """Values of a single group."""
    weights = options.pop("weights", dict.fromkeys(outcome, 1.0))
    rule = rule_of(weights, process_weight=0.0 if process is None else 1.0, **options)
    return group_advantages([GroupRewards(outcome, process)], rule)[0].values


def standardised(r: Tensor) -> Tensor:
    return (r - r.mean()) / r.std()


def test_sums_the_rewards_normalised_one_by_one() -> None:
    a, b, process = rewards(0), 100 * rewards(1), rewards(2, 6, 4)
    result = one({"a": a, "b": b}, process, weights={"a": 1.0, "b": 0.5})
    assert result.shape == (1, 6, 4)
    for k in range(4):
        expected = standardised(a) + 0.5 * standardised(b) + standardised(process[:, k])
        torch.testing.assert_close(result[0, :, k], expected, atol=1e-5, rtol=1e-5)


def test_losses_keep_one_component_a_reward_each_clipped() -> None:
    a, process = rewards(0), rewards(2, 6, 4)
    result = one({"a": a}, process, combine="losses", clip=1.0)
    assert result.shape == (2, 6, 4)
    torch.testing.assert_close(result[0], standardised(a).clamp(-1, 1)[:, None].expand(6, 4))
    torch.testing.assert_close(result[1, :, 2], standardised(process[:, 2]).clamp(-1, 1), atol=1e-6, rtol=1e-5)


@given(seed=st.integers(0, 2**31), shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_a_shifted_and_scaled_reward_changes_nothing(seed: int, shift: float, scale: float) -> None:
    r = rewards(seed)
    torch.testing.assert_close(one({"a": r}), one({"a": r.double() * scale + shift}), atol=1e-4, rtol=1e-3)


@given(seed=st.integers(0, 2**31), order=st.permutations(range(6)))
@settings(max_examples=50, deadline=None)
def test_permuting_samples_permutes_advantages(seed: int, order: list[int]) -> None:
    r, p = rewards(seed), rewards(seed + 1, 6, 3)
    torch.testing.assert_close(one({"a": r[order]}, p[order]), one({"a": r}, p)[:, order])


def test_a_group_without_spread_gets_zero_and_is_named() -> None:
    flat = torch.full((5,), 0.3)
    rule = rule_of({"flat": 1.0, "live": 1.0})
    result = group_advantages([GroupRewards({"flat": flat, "live": rewards(0, 5)})], rule)[0]
    assert result.flat == {"flat"}
    assert torch.equal(one({"flat": flat}), torch.zeros(1, 5, 1))


def test_spread_by_rounding_alone_is_no_spread() -> None:
    # What a batch of equal states gives: the same number up to float32 rounding.
    process = torch.full((6, 1), 0.7) + 1e-7 * rewards(0, 6, 1)
    normalised, has_spread = normalise(process, ddof=1, eps=1e-8)
    assert not has_spread.any()
    assert torch.equal(normalised, torch.zeros(6, 1))


@pytest.mark.parametrize("ddof", [0, 1])
def test_ddof_and_clip(ddof: int) -> None:
    r = torch.tensor([0.0, 0.0, 0.0, 1.0])
    expected = (r - r.mean()) / r.std(correction=ddof)
    torch.testing.assert_close(one({"a": r}, ddof=ddof)[0, :, 0], expected)
    assert float(one({"a": r}, ddof=ddof, clip=0.5).abs().max()) == 0.5


def test_global_scope_divides_by_the_spread_over_all_groups() -> None:
    """Numbers of Flow-GRPO's PerPromptStatTracker with global_std: rewards 1, 2 | 3, 5, ddof 0, eps 1e-4."""
    groups = [GroupRewards({"a": torch.tensor([1.0, 2.0])}), GroupRewards({"a": torch.tensor([3.0, 5.0])})]

    def values(scope: str) -> Tensor:
        rule = rule_of({"a": 1.0}, scope=scope, ddof=0, eps=1e-4)
        return torch.cat([g.values.flatten() for g in group_advantages(groups, rule)])

    torch.testing.assert_close(values("global"), torch.tensor([-0.338, 0.338, -0.676, 0.676]), atol=5e-4, rtol=0)
    torch.testing.assert_close(values("group"), torch.tensor([-0.9998, 0.9998, -0.9999, 0.9999]), atol=1e-4, rtol=0)


def test_a_threshold_makes_a_reward_binary() -> None:
    r = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(one({"a": r}, thresholds={"a": 0.25}), one({"a": torch.tensor([0.0, 0.0, 1.0, 1.0])}))


def test_best_of_keeps_the_best_and_the_worst_of_each_group() -> None:
    groups = [
        GroupRewards({"a": torch.tensor([3.0, 9.0, 1.0, 5.0, 7.0, 2.0])}),
        GroupRewards({"a": torch.tensor([0.6, 0.1, 0.2, 0.5, 0.4, 0.3])}),
    ]
    rule = rule_of({"a": 1.0}, best_of=2)
    first, second = group_advantages(groups, rule)
    assert first.samples == (1, 2, 4, 5)
    assert second.samples == (0, 1, 2, 3)
    # Advantages are those over the whole group.
    torch.testing.assert_close(first.values[0, :, 0], standardised(groups[0].outcome["a"]))
    everything = group_advantages(groups, rule_of({"a": 1.0}, best_of=3))
    assert everything[0].samples == tuple(range(6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(bad: float) -> None:
    r = rewards(0)
    r[2] = bad
    with pytest.raises(ValueError, match="'a' is not finite"):
        one({"a": r})
    with pytest.raises(ValueError, match="process rewards are not finite"):
        one({"a": rewards(0)}, r[:, None])


def test_no_weighted_reward_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        one({"a": rewards(0)}, weights={"a": 0.0})

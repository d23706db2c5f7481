import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics import group_advantages
from dynamics.advantages import normalise


def rewards(seed: int, group: int = 6) -> torch.Tensor:
    return torch.randn(group, generator=torch.Generator().manual_seed(seed))


def advantages(outcome: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    weights = dict.fromkeys(outcome, 1.0) | options.pop("weights", {})  # type: ignore[operator]
    process = options.pop("process", None)
    return group_advantages(outcome, weights, process, 1.0, num_steps=4, **options).values  # type: ignore[arg-type]


def test_sums_the_rewards_normalised_one_by_one() -> None:
    a, b, process = rewards(0), 100 * rewards(1), torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    result = advantages({"a": a, "b": b}, weights={"b": 0.5}, process=process)
    for k in range(4):
        expected = sum(w * (r - r.mean()) / r.std() for w, r in ((1.0, a), (0.5, b), (1.0, process[:, k])))
        torch.testing.assert_close(result[:, k], expected, atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 2**31), shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_a_shifted_and_scaled_reward_changes_nothing(seed: int, shift: float, scale: float) -> None:
    r = rewards(seed)
    torch.testing.assert_close(
        advantages({"a": r}), advantages({"a": r.double() * scale + shift}), atol=1e-4, rtol=1e-3
    )


@given(seed=st.integers(0, 2**31), order=st.permutations(range(6)))
@settings(max_examples=50, deadline=None)
def test_permuting_samples_permutes_advantages(seed: int, order: list[int]) -> None:
    r = rewards(seed)
    torch.testing.assert_close(advantages({"a": r[order]}), advantages({"a": r})[order])


def test_a_group_without_spread_gets_zero_and_is_named() -> None:
    result = group_advantages(
        {"flat": torch.full((5,), 0.3), "live": rewards(0, 5)}, {"flat": 1.0, "live": 1.0}, None, 0.0, num_steps=2
    )
    assert result.flat == {"flat"}
    only = group_advantages({"flat": torch.full((5,), 0.3)}, {"flat": 1.0}, None, 0.0, num_steps=2)
    assert torch.equal(only.values, torch.zeros(5, 2))


def test_spread_by_rounding_alone_is_no_spread() -> None:
    # What a batch of equal states gives: the same number up to float32 rounding.
    process = torch.full((6, 1), 0.7) + 1e-7 * torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    normalised, has_spread = normalise(process, ddof=1, eps=1e-8)
    assert not has_spread.any()
    assert torch.equal(normalised, torch.zeros(6, 1))


@pytest.mark.parametrize("ddof", [0, 1])
def test_ddof_and_clip(ddof: int) -> None:
    r = torch.tensor([0.0, 0.0, 0.0, 1.0])
    expected = (r - r.mean()) / r.std(correction=ddof)
    torch.testing.assert_close(advantages({"a": r}, ddof=ddof)[:, 0], expected)
    assert float(advantages({"a": r}, ddof=ddof, clip=0.5).abs().max()) == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(bad: float) -> None:
    r = rewards(0)
    r[2] = bad
    with pytest.raises(ValueError, match="'a' is not finite"):
        advantages({"a": r})

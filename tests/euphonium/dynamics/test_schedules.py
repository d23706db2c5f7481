"""The forward process and the time shift against their equations."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from euphonium.dynamics import noised, schedules, shift_sigma, shifted_sigmas

fractions = st.floats(0, 1)
shifts = st.floats(0.05, 20)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 1, 4, 4)])
def test_the_forward_process_mixes_each_sample_by_its_own_sigma(shape: tuple[int, ...]) -> None:
    x0, noise, sigma = normal(*shape), normal(*shape, seed=1), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    mixed = noised(x0, noise, sigma)
    for i, level in enumerate(sigma.tolist()):
        torch.testing.assert_close(mixed[i], (1 - level) * x0[i] + level * noise[i], atol=1e-14, rtol=0)


def test_the_forward_process_begins_at_data_and_ends_at_noise() -> None:
    x0, noise = normal(2, 3, 4).float(), normal(2, 3, 4, seed=1).float()
    ends = noised(x0, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(ends[0], x0[0])
    assert torch.equal(ends[1], noise[1])


def test_the_velocity_is_the_slope_of_the_forward_process() -> None:
    """``v = noise - x0``, which the networks are trained on, is ``d x_sigma / d sigma``."""
    x0, noise = normal(4, 6), normal(4, 6, seed=1)
    _, slope = torch.func.jvp(
        lambda sigma: noised(x0, noise, sigma), (torch.full((4,), 0.3).double(),), (torch.ones(4).double(),)
    )
    torch.testing.assert_close(slope, noise - x0)


@given(sigma=fractions, shift=shifts)
def test_a_shift_is_undone_by_its_inverse(sigma: float, shift: float) -> None:
    level = torch.tensor([sigma], dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(level, shift), 1 / shift), level, atol=1e-12, rtol=1e-12)


@given(sigma=st.floats(0.01, 0.99), shift=shifts)
def test_a_shift_multiplies_the_odds_of_noise(sigma: float, shift: float) -> None:
    moved = float(shift_sigma(torch.tensor(sigma, dtype=torch.float64), shift))
    assert moved / (1 - moved) == pytest.approx(shift * sigma / (1 - sigma), rel=1e-9)


@given(steps=st.integers(1, 60), shift=shifts)
def test_a_grid_falls_strictly_from_noise_to_data(steps: int, shift: float) -> None:
    grid = shifted_sigmas(steps, shift)
    assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0)
    assert bool((grid[1:] < grid[:-1]).all())


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (4, 0.0), (4, -1.0), (4, float("inf")), (4, float("nan"))])
def test_a_grid_that_cannot_be_is_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        shifted_sigmas(steps, shift)


def test_the_examples_hold() -> None:
    outcome = doctest.testmod(schedules)
    assert (outcome.failed, outcome.attempted) == (0, 3)

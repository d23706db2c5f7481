"""DiffusionNFT's and Diffusion-DPO's losses against their equations, and the forward process that they share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from euphonium.dynamics import StepTable, noised, shifted_sigmas
from euphonium.dynamics.forward_process import dpo_loss, dpo_margin, nft_loss, optimality

ROWS, SHAPE = 4, (3, 2)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow() -> StepTable:
    return StepTable.build("ode", shifted_sigmas(6, 3.0))


def diffusion() -> StepTable:
    return StepTable.build_ddim(torch.tensor([0.01, 0.1, 0.4, 0.8, 1.0]), torch.tensor([0.9, 0.6, 0.3, 0.1]))


@pytest.mark.parametrize("table", [flow(), diffusion()], ids=["velocity", "noise"])
def test_a_network_that_knows_the_sample_predicts_it(table: StepTable) -> None:
    steps = torch.tensor([0, 1, 2, 3])
    data, noise = drawn(0, ROWS, *SHAPE).float(), drawn(1, ROWS, *SHAPE).float()
    x = table.noised(steps, data, noise)
    output = table.output_for(steps, x, data)
    torch.testing.assert_close(output, noise if table.predicts_noise else noise - data, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(table.predicted_data(steps, x, output), data, atol=2e-5, rtol=1e-5)
    for k in steps.tolist():
        one = table.predicted_data(k, x[k : k + 1], output[k : k + 1])
        assert torch.equal(one, table.predicted_data(steps, x, output)[k : k + 1])


def test_the_forward_process_of_a_flow_is_the_straight_line() -> None:
    table, steps = flow(), torch.tensor([0, 2, 4, 5])
    data, noise = drawn(0, ROWS, *SHAPE).float(), drawn(1, ROWS, *SHAPE).float()
    torch.testing.assert_close(table.noised(steps, data, noise), noised(data, noise, table.sigmas[steps].float()))
    assert torch.equal(table.noised(0, data, noise), noise)


def test_optimality_is_the_advantage_between_its_bounds() -> None:
    found = optimality(torch.tensor([-9.0, -4.0, 0.0, 1.0, 4.0, 9.0]), 4.0)
    assert found.tolist() == [0.0, 0.0, 0.5, 0.625, 1.0, 1.0]


@given(seed=st.integers(0, 999), mixture=st.floats(0.05, 2.0), good=st.floats(0.0, 1.0))
def test_where_the_policy_is_the_old_one_the_gradient_is_that_of_good_minus_bad(
    seed: int, mixture: float, good: float
) -> None:
    """Loss ``|old - data|^2 / w / beta`` for every r; gradient ``(2 r - 1) 2 (old - data) / w`` for every beta."""
    data, old = drawn(seed, ROWS, *SHAPE), drawn(seed + 1000, ROWS, *SHAPE)
    predicted = old.clone().requires_grad_(True)
    losses = nft_loss(data, predicted, old, torch.full((1, ROWS), good, dtype=torch.float64), mixture)
    losses.sum().backward()
    error = (old - data).flatten(1)
    scale = error.abs().mean(dim=1)
    torch.testing.assert_close(losses[0], error.square().mean(dim=1) / scale / mixture)
    expected = (2 * good - 1) * 2 * error / (scale[:, None] * error.shape[1])
    assert predicted.grad is not None
    torch.testing.assert_close(predicted.grad.flatten(1), expected)


@given(seed=st.integers(0, 999), mixture=st.floats(0.05, 2.0), good=st.floats(0.0, 1.0))
def test_the_negative_policy_is_the_mirror_image_of_the_positive_one(seed: int, mixture: float, good: float) -> None:
    data, old, predicted = (drawn(seed + offset, ROWS, *SHAPE) for offset in (0, 1000, 2000))
    r = torch.full((1, ROWS), good, dtype=torch.float64)
    mirrored = nft_loss(data, 2 * old - predicted, old, 1 - r, mixture)
    torch.testing.assert_close(nft_loss(data, predicted, old, r, mixture), mirrored)


@pytest.mark.parametrize("mixture", [0.25, 1.0])
def test_the_optimum_is_the_improvement_that_the_paper_proves(mixture: float) -> None:
    """The minimum is ``old + (2 / beta) alpha (positive - old)``, with alpha the share of good samples behind a state.

    Samples are 1, which is good, and -1, which is not, equally often behind one state: the old policy predicts 0, the
    positive one 1, and alpha is 1/2.
    """
    data, old = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)
    good = torch.tensor([[1.0, 0.0]])

    def loss(predicted: float) -> float:
        return float(nft_loss(data, torch.full((2, 1), predicted), old, good, mixture).sum())

    optimum = 2 / mixture * 0.5 * 1.0
    assert loss(optimum) == pytest.approx(0, abs=1e-6)
    for other in (-1.0, 0.0, optimum - 0.1, optimum + 0.1):
        assert loss(other) > 0.01


def test_components_share_the_predictions_and_have_an_r_each() -> None:
    data, old, predicted = (drawn(offset, ROWS, *SHAPE) for offset in (0, 1, 2))
    good = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(3)).double()
    both = nft_loss(data, predicted, old, good, 0.5)
    for component in (0, 1):
        alone = nft_loss(data, predicted, old, good[component : component + 1], 0.5)
        torch.testing.assert_close(both[component : component + 1], alone)


def test_a_perfect_prediction_has_a_finite_loss() -> None:
    data = drawn(0, ROWS, *SHAPE)
    predicted = data.clone().requires_grad_(True)
    loss = nft_loss(data, predicted, data, torch.ones(1, ROWS).double(), 1.0).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()


@given(beta=st.floats(0.1, 50), gains=st.tuples(*[st.floats(-1, 1)] * 2), first_is_better=st.booleans())
def test_the_loss_of_a_pair_is_diffusion_dpos(beta: float, gains: tuple[float, float], first_is_better: bool) -> None:
    reference = torch.tensor([1.5, 2.5], dtype=torch.float64)
    error = reference - torch.tensor(gains, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0] if first_is_better else [-1.0, 1.0], dtype=torch.float64)
    better, worse = gains if first_is_better else gains[::-1]
    (margin,) = dpo_margin(error, reference, advantages, beta)
    assert float(margin) == pytest.approx(beta / 2 * (better - worse), abs=1e-9)
    expected = math.log1p(math.exp(-float(margin)))
    assert float(dpo_loss(margin)) == pytest.approx(expected, rel=1e-9)


def test_at_the_reference_pairs_pull_equally_and_ties_not_at_all() -> None:
    error = torch.tensor([0.3, 0.9, 0.4, 0.8], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([0.5, 2.0, 1.0, 1.0])
    loss = dpo_loss(dpo_margin(error, error.detach().clone(), advantages, beta=8.0)).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * math.log(2))
    assert error.grad is not None
    assert error.grad.tolist() == pytest.approx([-2.0, 2.0, 0.0, 0.0])  # beta / 4: the better one's error is to fall

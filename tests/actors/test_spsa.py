from typing import Any

import torch
from torch import Tensor

from actors.spsa import SpsaSource
from euphonium.dynamics import StepTable, shifted_sigmas
from euphonium.wire.later import Later

TABLE = StepTable.build("dance", shifted_sigmas(6, 3.0), eta=0.4)


def source(score: Any, perturbations: int, velocity: Any = None) -> SpsaSource:
    still = velocity or (lambda x, time: torch.zeros_like(x))
    return SpsaSource(TABLE, still, score, perturbations=perturbations, scale=1e-3, seed=0)


def linear(weights: Tensor) -> object:
    return lambda x: Later(lambda: (x * weights).flatten(1).sum(1))


def test_the_estimate_approaches_the_gradient_as_perturbations_grow() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 2, generator=generator)
    x = torch.randn(4, 3, 2, generator=generator)
    errors = []
    for count in (1, 16, 1024):
        rewards, gradient = source(linear(weights), count).submit(2, x, with_gradient=True).result()
        assert gradient is not None
        errors.append(float((gradient - weights).norm() / (2 * weights.norm())))
        torch.testing.assert_close(rewards, (x * weights).flatten(1).sum(1), atol=1e-3, rtol=1e-3)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.15


def test_it_differentiates_through_the_predicted_data() -> None:
    """With a linear velocity v = c x the predicted data is (1 - sigma c) x, and so is the gradient's factor."""
    weights, c, k = torch.ones(3, 2), 0.3, 2
    x = torch.zeros(2, 3, 2)
    estimate = source(linear(weights), 4096, lambda x, time: c * x).submit(k, x, with_gradient=True)
    _, gradient = estimate.result()
    assert gradient is not None
    factor = 1 - float(TABLE.sigmas[k]) * c
    torch.testing.assert_close(gradient.mean(), torch.tensor(factor), atol=0.05, rtol=0)


def test_one_request_scores_all_perturbed_samples_and_samples_stay_apart() -> None:
    sizes = []

    def score(x: Tensor) -> object:
        sizes.append(len(x))
        return Later(lambda: torch.arange(len(x), dtype=torch.float32) * 0)

    _, gradient = source(score, 5).submit(1, torch.randn(3, 2), with_gradient=True).result()
    assert sizes == [30]
    assert gradient is not None
    assert torch.equal(gradient, torch.zeros(3, 2))


def test_the_final_state_is_scored_as_it_is() -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    rewards, gradient = source(linear(torch.ones(2)), 1).submit(6, x, with_gradient=False).result()
    assert gradient is None
    torch.testing.assert_close(rewards, x.sum(1))

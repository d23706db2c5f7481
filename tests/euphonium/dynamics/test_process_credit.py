"""What crediting an action with a process reward teaches, on a policy with one parameter, exactly.

The policy's output is ``theta x``. The noise of every state runs through ``+- sqrt(d) e_j``, which has the mean and the
covariance of a Gaussian, so that the averages below are the expectations without any sampling error.
"""

import pytest
import torch
from torch import Tensor

from euphonium.dynamics import StepTable, shifted_sigmas

K, D = 2, 4
TABLE = StepTable.build("dance", shifted_sigmas(6, 3.0), eta=0.7, sde_window=(0, 5))


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """States, next states with every noise, and theta."""
    axes = D**0.5 * torch.eye(D)
    noise = torch.cat([axes, -axes])[:, None]
    x = torch.randn(64, 1, D, generator=torch.Generator().manual_seed(0)).repeat_interleave(2 * D, dim=0)
    theta = torch.tensor(0.3, requires_grad=True)
    with torch.no_grad():
        following = TABLE.sample(K, TABLE.mean(K, x, theta * x), noise.repeat(64, 1, 1))
    return x, following, theta


def taught(credit: Tensor) -> float:
    """The policy gradient ``sum of credit * grad log pi``."""
    x, following, theta = drawn()
    log_prob = TABLE.log_prob(K, following, TABLE.mean(K, x, theta * x))
    return float(torch.autograd.grad((credit * log_prob).sum(), theta)[0])


def reward(x: Tensor) -> Tensor:
    """A process reward that is linear in the state."""
    return x.flatten(1) @ torch.tensor([1.0, -2.0, 0.5, 3.0])


def test_the_state_that_an_action_leaves_teaches_nothing() -> None:
    x, following, _ = drawn()
    scale = abs(taught(reward(following)))
    assert abs(taught(reward(x))) < 1e-4 * scale
    assert abs(taught(reward(x).exp())) < 1e-3 * scale, "whatever the reward is"


def test_the_state_that_it_leads_to_teaches_the_gradient_of_the_expected_reward() -> None:
    x, following, theta = drawn()
    expected = reward(TABLE.mean(K, x, theta * x)).sum()
    (gradient,) = torch.autograd.grad(expected, theta)
    # Log-probabilities are averages over the dimensions here.
    assert D * taught(reward(following)) == pytest.approx(float(gradient), rel=1e-3)


def test_progress_teaches_the_same_with_less_noise() -> None:
    x, following, _ = drawn()
    progress = reward(following) - reward(x)
    assert taught(progress) == pytest.approx(taught(reward(following)), rel=1e-3)
    assert float(progress.var()) < float(reward(following).var())

"""Gradients scaled for each member of a group, over the iterations, and in units of the step's noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.guidance import ScaledGradients, member_strengths, noise_length
from actors.sampler import Rewarded, credited_steps
from euphonium.config import GuidanceConfig, ProcessRewardConfig, SamplerConfig
from euphonium.dynamics import StepTable, shifted_sigmas
from euphonium.wire.later import Later

SHAPE = (3, 2, 4, 4)


class Given:
    """A source with known gradients."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        return Later(lambda: (torch.arange(float(len(x))), self.gradient if with_gradient else None))


def table(scale: float = 1.0) -> StepTable:
    guidance = GuidanceConfig(scale=scale).build()
    return StepTable.build("dance", shifted_sigmas(6, 3.0), eta=0.5, guidance=guidance, sde_window=(0, 5))


def scaled(gradient: Tensor, **settings: object) -> Tensor:
    config = GuidanceConfig(scale=1.0, **settings)  # type: ignore[arg-type]
    source = ScaledGradients(Given(gradient), config, table())
    rewards, found = source.submit(2, torch.zeros_like(gradient), with_gradient=True).result()
    assert torch.equal(rewards, torch.arange(float(len(gradient))))
    assert found is not None
    return found


def test_members_are_guided_by_strength_in_turn() -> None:
    gradient = torch.randn(5, *SHAPE)
    assert torch.equal(scaled(gradient), gradient)
    found = scaled(gradient, strengths=(0.0, 0.5, 2.0))
    assert torch.equal(found, gradient * torch.tensor([0.0, 0.5, 2.0, 0.0, 0.5]).view(-1, 1, 1, 1, 1))


@given(st.floats(1e-3, 1e3), st.floats(0.01, 3.0))
def test_a_scale_in_noise_pushes_as_far_as_so_much_noise(size: float, scale: float) -> None:
    """Whatever the reward model's scale: the push's length is ``scale`` times that of the noise, on average."""
    gradient = size * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    steps = table(scale)
    config = GuidanceConfig(scale=scale, normalise="noise")
    source = ScaledGradients(Given(gradient), config, steps)
    x = torch.zeros_like(gradient)
    for k in range(5):
        pushed = source.submit(k, x, with_gradient=True).result()[1]
        push = steps.mean(k, x, x, pushed) - steps.mean(k, x, x)
        expected = scale * float(steps.std[k]) * math.sqrt(gradient[0].numel())
        torch.testing.assert_close(push.flatten(1).norm(dim=1), torch.full((2,), expected), rtol=1e-4, atol=1e-6)
    assert noise_length(steps, 5, 10) == 0


def test_nothing_is_scaled_where_no_gradient_is_asked_for() -> None:
    config = GuidanceConfig(scale=1.0, strengths=(0.0,))
    source = ScaledGradients(Given(torch.ones(2, *SHAPE)), config, table())
    assert source.submit(0, torch.zeros(2, *SHAPE), with_gradient=False).result()[1] is None


def test_guidance_falls_linearly_and_ends() -> None:
    sampler = SamplerConfig(eta=0.5, num_steps=4, guidance=GuidanceConfig(scale=2.0, until=4))
    tables = [sampler.table(shifted_sigmas(4, 1.0), iteration) for iteration in range(6)]
    strengths = [float(table.coef_grad.sum()) for table in tables]
    assert strengths == pytest.approx([strengths[0] * left for left in (1, 0.75, 0.5, 0.25, 0, 0)])
    assert tables[3].guided_steps
    assert not tables[4].guided_steps
    # The learner refuses groups that were drawn with another strength.
    assert len({table.fingerprint() for table in tables}) == 5
    by_beta = GuidanceConfig(beta=1.0, until=2).at(1)
    assert by_beta is not None
    assert by_beta.beta == 2.0


def test_noise_units_need_a_scale() -> None:
    with pytest.raises(ValueError, match="in units of the noise by scale"):
        GuidanceConfig(beta=1.0, normalise="noise")


def test_member_strengths_repeat() -> None:
    assert member_strengths((1.0,), 3).tolist() == [1, 1, 1]


def test_steps_without_noise_get_no_credit() -> None:
    steps = table()
    assert credited_steps(ProcessRewardConfig(path="prm"), steps) == [0, 1, 2, 3, 4]
    windowed = StepTable.build(
        "dance", shifted_sigmas(6, 3.0), eta=0.5, guidance=GuidanceConfig(scale=1, window=(2, 6)).build(),
        sde_window=(0, 5),
    )  # fmt: skip
    assert credited_steps(ProcessRewardConfig(path="prm", steps="guided"), windowed) == [2, 3, 4]

"""Guidance at inference: how far it reaches on other grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest

from actors.guidance import noise_length
from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from orchestrator.generation.policies import inference_guidance

SHIFT = 5
PROMPT = "a red car moving left on a white background"


def begins(k: int, steps: int) -> Fraction:
    """Time t at which step k of a shifted grid begins, exactly."""
    u = 1 - Fraction(k, steps)
    return 1 - SHIFT * u / (1 + (SHIFT - 1) * u)


@pytest.mark.parametrize("window", [(8, 16), (8, 15), (0, 4), (12, 13)])
@pytest.mark.parametrize("steps", [16, 30, 50])
def test_guidance_at_inference_lasts_as_long_as_the_rollouts_guided_steps(
    window: tuple[int, int], steps: int, make_config: Callable[..., RunConfig]
) -> None:
    sampler = (
        f"sampler={{law: dance, eta: 0.3, num_steps: 16, shift: {SHIFT}, guidance: {{scale: 1, window: {[*window]}}}}}"
    )
    config = make_config(sampler)
    guidance = inference_guidance(config)
    table = open_generator(config.model).ode_table(steps, config.sampler, guidance)
    first, end = begins(window[0], 16), begins(window[1], 16)
    assert table.guided_steps == [k for k in range(steps) if first <= begins(k, steps) < end]
    if steps == 16:
        assert table.guided_steps == list(range(*window))
    if window == (8, 16):
        assert table.guided_steps[-1] == steps - 1


@pytest.mark.parametrize("window", ["window: [1, 3]", "time_window: [0.05, 0.6]"])
def test_guidance_in_units_of_noise_pushes_an_ode_as_far_in_all_as_a_rollout(
    window: str, make_config: Callable[..., RunConfig]
) -> None:
    """The ODE has no noise to measure by: the rollout's pushes are spread evenly over the time they act in."""
    config = make_config(f"sampler.guidance={{scale: 0.12, normalise: noise, {window}}}")
    generator = open_generator(config.model)
    rollout = generator.step_table(config.sampler)
    in_rollout = sum(
        float(rollout.coef_grad[k]) * noise_length(rollout, k, math.prod(generator.latent_shape))
        for k in rollout.guided_steps
    )
    guidance = inference_guidance(config)
    assert guidance.normalise is True  # gradients of length 1
    table = generator.ode_table(400, config.sampler, guidance)
    assert in_rollout > 0
    # Up to the two steps of the fine grid at the window's ends.
    assert float(table.coef_grad.sum()) == pytest.approx(in_rollout, rel=0.02)


def test_guidance_of_scale_0_cannot_be_kept(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="scale is 0"):
        inference_guidance(make_config("sampler.guidance={scale: 0}"))


def test_a_beta_is_kept_where_it_is_a_rate(make_config: Callable[..., RunConfig]) -> None:
    # Under the law dance the transition's variance is eta^2 delta, so beta pushes by eta^2 / (2 beta) a unit of time.
    guidance = inference_guidance(make_config("sampler.guidance={beta: 0.25}"))
    assert guidance.scale == pytest.approx(0.5**2 / (2 * 0.25))
    assert guidance.beta is None
    with pytest.raises(ConfigError, match="guidance by beta under the law sage, or scaled per step, has no rate"):
        inference_guidance(make_config("sampler={law: sage, eta: 0.5, num_steps: 4, shift: 3, guidance: {beta: 0.5}}"))


def test_a_time_window_is_half_open() -> None:
    from euphonium.dynamics import Guidance, shifted_sigmas

    table = StepTable.build("ode", shifted_sigmas(4, 1.0), guidance=Guidance(scale=1.0, time_window=(0.25, 0.75)))
    assert table.guided_steps == [1, 2]

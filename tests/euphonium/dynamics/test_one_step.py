"""What training on one step a prompt needs: windows of groups, rectified weights, and Flow-GRPO's law for Wan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from euphonium.config import ModelConfig, SamplerConfig
from euphonium.dynamics import Guidance, StepTable, shifted_sigmas
from euphonium.dynamics.windows import middle_window
from euphonium.generators.registry import open_generator


def sampler(**more: object) -> SamplerConfig:
    window = {"kind": "group", "size": 1, "allowed": [0, 8]}
    return SamplerConfig.model_validate({"eta": 0.7, "num_steps": 10, "shift": 3.0, "sde_window": window} | more)


@pytest.mark.parametrize("law", ["dance", "flow_grpo", "flow_grpo_wan", "sage", "cps"])
def test_a_group_s_table_has_the_numbers_of_the_table_that_scores_it(law: str) -> None:
    config = sampler(law=law, guidance={"scale": 0.2, "window": [2, 6]})
    sigmas = shifted_sigmas(10, 3.0)
    scored = config.table(sigmas)
    assert scored.stochastic_steps == list(range(8))
    starts = Counter()
    for ordinal in range(200):
        own = config.of_group(ordinal)
        table = own.table(sigmas)
        (k,) = table.stochastic_steps
        starts[k] += 1
        assert config.of_group(ordinal) == own
        for column in ("coef_x", "coef_v", "std", "coef_grad"):
            assert getattr(table, column)[k] == getattr(scored, column)[k]
        others = [j for j in range(10) if j != k]
        ode = StepTable.build("ode", sigmas, guidance=Guidance(scale=0.2, window=(2, 6)))
        assert torch.equal(table.coef_v[others], ode.coef_v[others])
        assert torch.equal(table.coef_grad, ode.coef_grad)
    assert set(starts) == set(range(8))
    assert max(starts.values()) < 60, "places are drawn evenly"


def test_groups_of_a_model_that_predicts_the_noise(folders: Callable[[str], object]) -> None:
    path = str(folders("StableDiffusionPipeline"))
    family = open_generator(ModelConfig(path=path, height=64, width=64))
    window = {"kind": "group", "size": 2, "allowed": [1, 7]}
    config = SamplerConfig.model_validate({"law": "ddim", "eta": 1.0, "num_steps": 8, "sde_window": window})
    scored = family.step_table(config)
    table = family.step_table(config.of_group(3))
    assert len(table.stochastic_steps) == 2
    for k in table.stochastic_steps:
        assert table.std[k] == scored.std[k]
        assert table.coef_v[k] == scored.coef_v[k]


def test_other_samplers_are_the_same_for_all_groups() -> None:
    for window in (None, [0, 4], {"kind": "random", "size": 2, "allowed": [0, 8]}):
        config = sampler(sde_window=window)
        assert config.of_group(3) is config
    assert sampler().of_group().sde_window == (3, 4)
    assert middle_window(size=2, allowed=(0, 5)) == (1, 3)
    with pytest.raises(ValueError, match="does not fit"):
        sampler(sde_window={"kind": "group", "size": 9, "allowed": [0, 8]})


def test_rectified_weights_are_flash_grpos() -> None:
    """Against the published coefficient 1 / (sqrt(dt) / s + s sqrt(dt) (1 - sigma) / (2 sigma)), over its mean."""
    eta, sigmas = 0.7, shifted_sigmas(10, 3.0)
    table = StepTable.build("flow_grpo", sigmas, eta=eta, sde_window=(1, 9))
    coefficients = []
    for k in range(1, 9):
        sigma, step = float(sigmas[k]), math.sqrt(float(sigmas[k] - sigmas[k + 1]))
        s = eta * math.sqrt(sigma / (1 - sigma))
        coefficients.append(1 / (step / s + s * step * (1 - sigma) / (2 * sigma)))
    wanted = torch.tensor(coefficients, dtype=torch.float64)
    assert torch.allclose(table.rectifier()[1:9], wanted / wanted.mean(), rtol=1e-12)
    assert table.rectifier()[0] == table.rectifier()[9] == 1
    # SAGE's equaliser is the same up to a factor.
    ratio = table.equaliser()[1:9] / table.rectifier()[1:9]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-12)


def test_the_law_for_wan_is_the_released_one() -> None:
    """Against the step of Flow-GRPO's code for Wan, written out; its time runs backwards (dt < 0)."""
    sigmas = torch.tensor([1.0, 0.96, 0.9, 0.8, 0.6, 0.3, 0.0], dtype=torch.float64)
    table = StepTable.build("flow_grpo_wan", sigmas, eta=1.0)
    x, v = torch.tensor(0.7), torch.tensor(-1.3)
    for k in range(6):
        sigma, dt = float(sigmas[k]), float(sigmas[k + 1] - sigmas[k])
        s = float(sigmas[-1]) + (float(sigmas[1]) - float(sigmas[-1])) * sigma
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        assert float(table.mean(k, x[None], v[None])) == pytest.approx(float(mean), rel=1e-6)
        assert float(table.std[k]) == pytest.approx(s * math.sqrt(-dt), rel=1e-12)


def test_the_released_coefficients_for_wan() -> None:
    """The range of 1 / c that Flash-GRPO's 20 steps with shift 3 have: 7.48 at the first step, 3.78 at the tenth."""
    table = StepTable.build("flow_grpo_wan", shifted_sigmas(20, 3.0), eta=1.0)
    inverse = table.std / table.coef_v.abs()
    assert float(inverse[0]) == pytest.approx(7.4770, rel=0.03)
    assert float(inverse[9]) == pytest.approx(3.7754, rel=0.03)


def test_guidance_at_every_nth_step_and_per_step() -> None:
    sigmas = shifted_sigmas(8, 2.0)
    delta = sigmas[:-1] - sigmas[1:]
    every = StepTable.build("dance", sigmas, eta=0.4, guidance=Guidance(scale=0.5, window=(1, 7), every=2))
    assert every.guided_steps == [1, 3, 5]
    assert torch.allclose(every.coef_grad[[1, 3, 5]], 0.5 * delta[[1, 3, 5]])
    per_step = StepTable.build("dance", sigmas, eta=0.4, guidance=Guidance(scale=0.5, per_step=True))
    assert per_step.coef_grad.tolist() == [0.5] * 8
    with pytest.raises(ValueError, match="scale_per: step is for guidance by scale"):
        Guidance(beta=1.0, per_step=True)
    with pytest.raises(ValueError, match="n at least 1"):
        Guidance(scale=1.0, every=0)

"""What the papers claim of the laws, checked in closed form on the float64 columns of the table."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from euphonium.dynamics import LAWS, StepTable, StepTableError, shifted_sigmas
from tests.euphonium.dynamics.tables import built_or_refused

STOCHASTIC = [law for law in LAWS if law != "ode"]
PRESERVING = [law for law in STOCHASTIC if law != "cps"]


def noise_schedule(steps: int) -> tuple[Tensor, Tensor]:
    """Alphas and times of Stable Diffusion's scaled-linear schedule, evenly spaced."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    times = torch.arange(steps, 0, -1) * (1000 // steps) - 1
    return torch.cat([alphas[times], torch.ones(1, dtype=torch.float64)]), times.double() / 1000


def euphonium_step(t: Tensor, delta: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Euler-Maruyama of Euphonium's Eq. 7, as coefficients of x and of u, and the standard deviation."""
    return 1 - delta * eps / (1 - t), delta * (1 + t * eps / (1 - t)), (2 * eps * delta).sqrt()


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_equation_7_without_reward_is_dancegrpos_step(shift: float) -> None:
    """``eps = eta^2 / 2``, constant; the paper's time is ``t = 1 - sigma`` and its velocity ``u = -v``."""
    eta, sigmas = 0.79, shifted_sigmas(16, shift)
    table = StepTable.build("dance", sigmas, eta=eta)
    of_x, of_u, std = euphonium_step(
        1 - sigmas[:-1], sigmas[:-1] - sigmas[1:], torch.full((16,), eta**2 / 2, dtype=torch.float64)
    )
    torch.testing.assert_close(table.coef_x, of_x, atol=1e-13, rtol=0)
    torch.testing.assert_close(table.coef_v, -of_u, atol=1e-13, rtol=0)
    torch.testing.assert_close(table.std, std, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_equation_7_without_reward_is_flow_grpos_sde(shift: float) -> None:
    """Euphonium's Appendix B: with ``eps = sigma_tau^2 / 2`` (Eq. 35), Eq. 7 is Flow-GRPO's SDE (Eq. 36).

    Flow-GRPO's diffusion coefficient is ``sigma_tau = eta sqrt(tau / (1 - tau))``, with tau_1 for tau = 1.
    """
    eta, tau = 0.7, shifted_sigmas(16, shift)
    now, delta = tau[:-1], tau[:-1] - tau[1:]
    below_one = now.clone()
    below_one[0] = tau[1]
    squared = eta**2 * now / (1 - below_one)
    table = StepTable.build("flow_grpo", tau, eta=eta)
    of_x, of_u, std = euphonium_step(1 - now, delta, squared / 2)
    # Eq. 36 over d tau = -delta: x - delta [v + sigma_tau^2 / (2 tau) (x + (1 - tau) v)].
    drift = squared / (2 * now)
    equation_36 = 1 - delta * drift, -delta * (1 + drift * (1 - now)), (squared * delta).sqrt()
    for column, ours, theirs in zip(
        (table.coef_x, table.coef_v, table.std), (of_x, -of_u, std), equation_36, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
        torch.testing.assert_close(column, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("steps", "shift"), [(20, 5.0), (8, 1.0)])
def test_sages_first_variance_is_the_integral_up_to_its_clamp(steps: int, shift: float) -> None:
    eta, sigmas = 0.5, shifted_sigmas(steps, shift)
    # In u = log(1 - sigma) the integrand sigma / (1 - sigma) d sigma is smooth: (1 - e^u) du.
    u = np.linspace(math.log(1 - 0.997), math.log(1 - float(sigmas[1])), 100_001)
    integral = np.trapezoid(1 - np.exp(u), u)
    variance = float(StepTable.build("sage", sigmas, eta=eta).std[0]) ** 2
    assert variance == pytest.approx(eta**2 * integral, rel=1e-8)


def final_moments(table: StepTable, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of the samples when data are N(mean, std^2): exact, for the velocity is linear."""
    m, variance = 0.0, 1.0
    for k in range(table.num_steps):
        sigma = float(table.sigmas[k])
        a, b, noise = float(table.coef_x[k]), float(table.coef_v[k]), float(table.std[k])
        # E[eps - x0 | x] = slope (x - (1 - sigma) mean) - mean.
        slope = (sigma - (1 - sigma) * std**2) / (((1 - sigma) * std) ** 2 + sigma**2)
        m, variance = (
            (a + b * slope) * m - b * (slope * (1 - sigma) + 1) * mean,
            (a + b * slope) ** 2 * variance + noise**2,
        )
    return m, math.sqrt(variance)


@pytest.mark.parametrize("law", ["ode", *PRESERVING])
def test_error_of_the_marginals_halves_with_the_step(law: str) -> None:
    """A Gaussian flow ends at the data's mean and deviation, with the first-order error of Euler's method.

    The noise starts at sigma = 0.9: nearer to 1 the variances of ``flow_grpo`` and ``sage`` do not shrink with the
    step (see the next test).
    """
    errors = []
    for steps in (200, 400, 800):
        table = StepTable.build(
            law, shifted_sigmas(steps, 1.0), eta=None if law == "ode" else 0.6,
            sde_window=None if law == "ode" else (steps // 10, steps),
        )  # fmt: skip
        m, s = final_moments(table, 1.5, 0.6)
        errors.append(np.array([abs(m - 1.5), abs(s - 0.6)]))
        assert errors[-1].max() < 3 / steps
    for coarse, fine in pairwise(errors):
        significant = coarse > 1e-9
        np.testing.assert_allclose(coarse[significant] / fine[significant], 2, rtol=0.1)
    assert (errors[0] > 1e-9).any()


@pytest.mark.parametrize("steps", [20, 80, 320])
def test_flow_grpos_first_step_widens_the_noise_however_short_it_is(steps: int) -> None:
    """On a uniform grid V_0 is eta^2 at every T, so the state's variance exceeds sigma_1^2 by eta^4 / 4 and more."""
    eta, sigmas = 0.7, shifted_sigmas(steps, 1.0)
    table = StepTable.build("flow_grpo", sigmas, eta=eta)
    assert float(table.std[0]) == pytest.approx(eta, abs=1e-12)
    # With the data known, x = eps and v = eps - x0.
    variance = float(table.coef_x[0] + table.coef_v[0]) ** 2 + float(table.std[0]) ** 2
    excess = variance - float(sigmas[1]) ** 2
    assert excess == pytest.approx(eta**4 / 4 + eta**2 / steps, abs=1e-12)


@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
@pytest.mark.parametrize(("steps", "shift"), [(6, 1.0), (12, 5.0)])
def test_cps_keeps_every_noise_level_exactly(eta: float, steps: int, shift: float) -> None:
    """With the data known, the state after step k is N((1 - sigma') x0, sigma'^2) at any number of steps."""
    table = StepTable.build("cps", shifted_sigmas(steps, shift), eta=eta)
    for k in range(steps):
        sigma, target = float(table.sigmas[k]), float(table.sigmas[k + 1])
        a, b, std = float(table.coef_x[k]), float(table.coef_v[k]), float(table.std[k])
        # x = (1 - sigma) x0 + sigma eps and v = eps - x0.
        assert a * (1 - sigma) - b == pytest.approx(1 - target, abs=1e-12)
        assert (a * sigma + b) ** 2 + std**2 == pytest.approx(target**2, abs=1e-12)


@pytest.mark.parametrize("eta", [None, 0.3, 1.0])
def test_ddim_keeps_every_noise_level_exactly(eta: float | None) -> None:
    """With the data known, the state after step k is N(sqrt(alpha') x0, 1 - alpha')."""
    alphas, times = noise_schedule(10)
    table = StepTable.build_ddim(alphas, times, eta=eta)
    for k in range(10):
        a, b, std = float(table.coef_x[k]), float(table.coef_v[k]), float(table.std[k])
        alpha, target = float(alphas[k]), float(alphas[k + 1])
        assert a * math.sqrt(alpha) == pytest.approx(math.sqrt(target), abs=1e-12)
        assert (a * math.sqrt(1 - alpha) + b) ** 2 + std**2 == pytest.approx(1 - target, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 200), eta=st.floats(1e-3, 1.5))
def test_every_ddim_table_is_refused_by_name_or_finite_with_positive_noise(steps: int, eta: float) -> None:
    table = built_or_refused(lambda: StepTable.build_ddim(*noise_schedule(steps), eta=eta))
    if table is None:
        return
    # The last step lands on data (alpha = 1), without noise.
    assert (table.std[:-1] > 0).all()
    assert float(table.std[-1]) == 0


@given(seed=st.integers(0, 2**31), steps=st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_ratio_is_one_on_policy_with_ddim(seed: int, steps: int) -> None:
    table = StepTable.build_ddim(*noise_schedule(steps), eta=1.0)
    x, output, z = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(seed)).unbind(0)
    assert table.stochastic_steps == list(range(steps - 1))
    for k in table.stochastic_steps:
        x_next = table.sample(k, table.mean(k, x, output), z)
        behaviour = table.log_prob(k, x_next, table.mean(k, x, output))
        replay = table.log_prob(torch.full((2,), k), x_next, table.mean(torch.full((2,), k), x, output))
        assert torch.equal(replay, behaviour)


@settings(max_examples=50, deadline=None)
@given(law=st.sampled_from(STOCHASTIC), steps=st.integers(2, 40), shift=st.floats(0.3, 6), eta=st.floats(0.05, 1.0))
def test_equalised_gradients_have_the_lower_median_length(law: str, steps: int, shift: float, eta: float) -> None:
    """``S_k N_k`` is one number, ``median(N)``, over all steps that have noise."""
    try:
        table = StepTable.build(law, shifted_sigmas(steps, shift), eta=eta)
    except StepTableError:
        return
    noisy = table.std > 0
    norms = table.coef_v.abs()[noisy] / table.std[noisy]
    product = table.equaliser()[noisy] * norms
    lower_median = norms.sort().values[(len(norms) - 1) // 2]
    torch.testing.assert_close(product, lower_median.expand_as(product))

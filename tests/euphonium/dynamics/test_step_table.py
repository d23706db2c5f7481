import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from euphonium.dynamics import LAWS, Guidance, StepTable, StepTableError, shifted_sigmas
from tests.euphonium.dynamics.tables import built_or_refused

REFERENCE = np.load(Path(__file__).parents[2] / "data" / "step_laws.npz")
CASES = json.loads(str(REFERENCE["meta"]))
STOCHASTIC = [law for law in LAWS if law != "ode"]


def reference(case: dict, name: str) -> torch.Tensor:
    return torch.from_numpy(REFERENCE[f"{case['id']}.{name}"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['law']}-step{c['step']}")
def test_reproduces_public_implementations(case: dict) -> None:
    guided = case["law"] == "euphonium"
    sigmas = shifted_sigmas(case["T"], case["shift"])
    torch.testing.assert_close(sigmas, reference(case, "sigmas").double(), atol=1e-6, rtol=0)
    table = StepTable.build(
        "dance" if guided else case["law"], sigmas, eta=case["eta"],
        guidance=Guidance(beta=case["beta"]) if guided else None,
    )  # fmt: skip
    k, x, v = case["step"], reference(case, "x"), reference(case, "v")
    unguided = table.mean(k, x, v)
    torch.testing.assert_close(unguided, reference(case, "mean"), atol=1e-6, rtol=0)
    x_next = reference(case, "x_next")
    if "gaussian" in case["logprob"]:
        ours = table.log_prob(k, x_next, unguided)
    else:
        # These sources leave out the constants and the variance; the residual is what they share with the Gaussian.
        assert case["logprob"] == "minus mean squared residual"
        ours = -(x_next - unguided).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, reference(case, "log_prob"), atol=1e-6, rtol=0)


def test_guided_mean_moves_by_beta_scaled_gradient() -> None:
    case = next(c for c in CASES if c["law"] == "euphonium" and c["step"] == 8)
    table = StepTable.build(
        "dance", shifted_sigmas(case["T"], case["shift"]), eta=case["eta"], guidance=Guidance(beta=case["beta"])
    )
    k, x, v, gradient = (case["step"], *(reference(case, n) for n in ("x", "v", "reward_gradient")))
    moved = table.mean(k, x, v, gradient) - table.mean(k, x, v)
    # Euphonium, Eq. 12: eps / beta per unit of time, with eps = eta^2 / 2.
    delta = float(table.sigmas[k] - table.sigmas[k + 1])
    torch.testing.assert_close(moved, case["eta"] ** 2 / 2 / case["beta"] * delta * gradient, atol=1e-6, rtol=0)


def test_shifted_sigmas_equal_the_diffusers_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 13)[:-1])
    torch.testing.assert_close(shifted_sigmas(12, 7.0).float(), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("law", [law for law in STOCHASTIC if law != "cps"])
def test_marginal_preserving_step_is_ode_step_plus_half_variance_times_score(law: str) -> None:
    table = StepTable.build(law, shifted_sigmas(12, 3.0), eta=0.6)
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    for k in range(table.num_steps):
        sigma, target = float(table.sigmas[k]), float(table.sigmas[k + 1])
        score = -(x + (1 - sigma) * v) / sigma
        expected = x - (sigma - target) * v + float(table.std[k]) ** 2 / 2 * score
        torch.testing.assert_close(table.mean(k, x, v), expected, atol=2e-6, rtol=1e-5)


def test_sage_variance_is_the_integral_of_flow_grpos() -> None:
    eta = 0.5
    table = StepTable.build("sage", shifted_sigmas(20, 5.0), eta=eta)
    for k in range(1, table.num_steps):
        grid = np.linspace(float(table.sigmas[k + 1]), float(table.sigmas[k]), 200_001)
        integrand = eta**2 * grid / (1 - grid)
        quadrature = np.trapezoid(integrand, grid)
        assert float(table.std[k]) ** 2 == pytest.approx(quadrature, rel=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(75, 5.0), (50, 7.0), (30, 12.0)])
def test_sage_stays_positive_where_clamping_inside_the_log_alone_does_not(steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(steps, shift)
    naive = math.log((1 - float(sigmas[1])) / (1 - 0.997)) - float(sigmas[0] - sigmas[1])
    assert naive < 0
    # Clamped alike at both ends, the first interval is empty when sigma_1 lies above the clamp: refused, by name.
    if float(sigmas[1]) >= 0.997:
        with pytest.raises(StepTableError, match="step 0 of law 'sage'"):
            StepTable.build("sage", sigmas, eta=0.5)
    else:
        assert (StepTable.build("sage", sigmas, eta=0.5).std > 0).all()


def test_cps_keeps_the_noise_level_and_has_no_noise_at_the_end() -> None:
    table = StepTable.build("cps", shifted_sigmas(10, 3.0), eta=0.7)
    x0, x1 = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    for k in range(table.num_steps - 1):
        sigma, target, std = float(table.sigmas[k]), float(table.sigmas[k + 1]), float(table.std[k])
        state = (1 - sigma) * x0 + sigma * x1
        kept = math.sqrt(target**2 - std**2)
        torch.testing.assert_close(table.mean(k, state, x1 - x0), (1 - target) * x0 + kept * x1, atol=1e-6, rtol=1e-5)
    assert float(table.std[-1]) == 0
    with pytest.raises(StepTableError, match=f"step {table.num_steps - 1} of law 'cps' has no noise"):
        table.log_prob(table.num_steps - 1, state, state)


def test_log_prob_is_the_gaussian_density_averaged_over_dimensions() -> None:
    table = StepTable.build("flow_grpo", shifted_sigmas(10, 3.0), eta=0.7)
    mean, x_next = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    normal = torch.distributions.Normal(mean.double(), float(table.std[3]))
    expected = normal.log_prob(x_next.double()).flatten(1).mean(1).float()
    ours = table.log_prob(3, x_next, mean)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_one_step_a_sample_equals_one_step_a_call() -> None:
    table = StepTable.build("dance", shifted_sigmas(10, 3.0), eta=0.3, guidance=Guidance(scale=0.5, window=(2, 6)))
    x, v, g = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    steps = torch.tensor([0, 3, 5, 9])
    together = table.mean(steps, x, v, g)
    for row, k in enumerate(steps.tolist()):
        assert torch.equal(together[row], table.mean(k, x, v, g)[row])
        alone = table.log_prob(k, x, together)[row]
        assert torch.equal(table.log_prob(steps, x, together)[row], alone)


@pytest.mark.parametrize("law", list(LAWS))
def test_guidance_composes_with_every_law(law: str) -> None:
    eta = None if law == "ode" else 0.5
    sigmas = shifted_sigmas(8, 3.0)
    table = StepTable.build(law, sigmas, eta=eta, guidance=Guidance(scale=0.2, window=(2, 5)))
    delta = sigmas[:-1] - sigmas[1:]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[2:5] = 0.2 * delta[2:5]
    torch.testing.assert_close(table.coef_grad, expected)
    assert table.guided_steps == [2, 3, 4]


@pytest.mark.parametrize("law", STOCHASTIC)
def test_guidance_by_beta_is_half_the_variance_over_beta(law: str) -> None:
    table = StepTable.build(law, shifted_sigmas(8, 3.0), eta=0.5, guidance=Guidance(beta=3.125))
    torch.testing.assert_close(table.coef_grad, table.std**2 / (2 * 3.125))


def test_steps_outside_the_sde_window_are_steps_of_the_ode() -> None:
    sigmas = shifted_sigmas(8, 3.0)
    mixed = StepTable.build("flow_grpo", sigmas, eta=0.7, sde_window=(2, 5))
    whole, ode = StepTable.build("flow_grpo", sigmas, eta=0.7), StepTable.build("ode", sigmas)
    assert mixed.stochastic_steps == [2, 3, 4]
    for k in range(8):
        source = whole if k in (2, 3, 4) else ode
        for column in ("coef_x", "coef_v", "std"):
            assert float(getattr(mixed, column)[k]) == float(getattr(source, column)[k])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch", shifted_sigmas(4, 1.0), {"eta": 0.1}), "unknown law 'nosuch'"),
        (("ode", shifted_sigmas(4, 1.0), {"eta": 0.1}), "takes no eta"),
        (("dance", shifted_sigmas(4, 1.0), {}), "needs eta > 0"),
        (("dance", shifted_sigmas(4, 1.0), {"eta": -1.0}), "needs eta > 0"),
        (("cps", shifted_sigmas(4, 1.0), {"eta": 1.5}), "eta in"),
        (("dance", torch.tensor([1.0, 0.5, 0.5, 0.0]), {"eta": 0.1}), "at step 1"),
        (("dance", torch.tensor([1.0]), {"eta": 0.1}), "at least one step"),
        (("flow_grpo", torch.tensor([1.0, 1.0 - 1e-17, 0.5]), {"eta": 0.1}), "at step 0"),
        (("dance", shifted_sigmas(4, 1.0), {"eta": 0.1, "guidance": Guidance(scale=1.0, window=(2, 9))}), r"\(2, 9\)"),
        (("ode", shifted_sigmas(4, 1.0), {"guidance": Guidance(beta=1.0)}), "needs a stochastic law"),
        (("dance", shifted_sigmas(4, 1.0), {"eta": 0.1, "sde_window": (3, 3)}), "sde_window"),
    ],
)
def test_refuses_what_cannot_be(arguments: tuple, message: str) -> None:
    law, sigmas, options = arguments
    with pytest.raises(StepTableError, match=message):
        StepTable.build(law, sigmas, **options)


@pytest.mark.parametrize("options", [{}, {"scale": 1.0, "beta": 1.0}, {"beta": 0.0}, {"scale": math.nan}])
def test_guidance_refuses_wrong_strengths(options: dict) -> None:
    with pytest.raises(StepTableError):
        Guidance(**options)


@settings(max_examples=200, deadline=None)
@given(
    law=st.sampled_from(STOCHASTIC),
    steps=st.integers(1, 120),
    shift=st.floats(0.05, 20),
    eta=st.floats(1e-3, 1.0),
)
def test_every_table_is_refused_by_name_or_finite_with_positive_noise(
    law: str, steps: int, shift: float, eta: float
) -> None:
    table = built_or_refused(lambda: StepTable.build(law, shifted_sigmas(steps, shift), eta=eta))
    if table is None:
        return
    trained = table.std[:-1] if law == "cps" else table.std
    assert (trained > 0).all()


@given(law=st.sampled_from(STOCHASTIC), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_ratio_is_one_on_policy(law: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = StepTable.build(law, shifted_sigmas(9, 3.0), eta=0.5, guidance=Guidance(scale=0.3))
    x, v, g, z = torch.randn(4, 5, 3, 4, generator=generator).unbind(0)
    for k in table.stochastic_steps:
        x_next = table.sample(k, table.mean(k, x, v, g), z)
        behaviour = table.log_prob(k, x_next, table.mean(k, x, v))
        replay = table.log_prob(torch.full((5,), k), x_next, table.mean(torch.full((5,), k), x, v))
        assert torch.equal(torch.exp(replay - behaviour), torch.ones(5))


def test_fingerprint_tells_samplers_apart() -> None:
    sigmas = shifted_sigmas(8, 3.0)
    tables = [
        StepTable.build("dance", sigmas, eta=0.3),
        StepTable.build("dance", sigmas, eta=0.31),
        StepTable.build("dance", shifted_sigmas(8, 3.1), eta=0.3),
        StepTable.build("dance", sigmas, eta=0.3, guidance=Guidance(scale=0.1)),
        StepTable.build("flow_grpo", sigmas, eta=0.3),
    ]
    assert len({table.fingerprint() for table in tables}) == len(tables)
    assert tables[0].fingerprint() == StepTable.build("dance", sigmas, eta=0.3).fingerprint()


def ddim_schedule(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    alphas = scheduler.alphas_cumprod.double()
    previous = scheduler.timesteps - scheduler.config.num_train_timesteps // steps
    path = torch.cat([alphas[scheduler.timesteps], alphas[previous[-1:].clamp(min=0)]])
    return path, scheduler.timesteps.double() / 1000


@pytest.mark.parametrize("eta", [None, 0.3, 1.0])
def test_ddim_equals_the_diffusers_scheduler(eta: float | None) -> None:
    from diffusers import DDIMScheduler

    steps = 12
    alphas, times = ddim_schedule(steps)
    table = StepTable.build_ddim(alphas, times, eta=eta)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps):
        x, eps, z = torch.randn(3, 2, 4, 8, 8, generator=generator).unbind(0)
        expected = scheduler.step(eps, t, x, eta=eta or 0.0, variance_noise=z).prev_sample
        torch.testing.assert_close(table.sample(k, table.mean(k, x, eps), z), expected, atol=2e-5, rtol=1e-5)


def test_ddim_without_noise_is_dancegrpos_equations_2_and_5() -> None:
    """``z_s / alpha_s = z_t / alpha_t + eps (sigma_s / alpha_s - sigma_t / alpha_t)``."""
    alphas, times = ddim_schedule(10)
    table = StepTable.build_ddim(alphas, times)
    x, eps = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
    for k in range(10):
        ratio = noise / signal
        expected = signal[k + 1] * (x / signal[k] + eps * (ratio[k + 1] - ratio[k]))
        torch.testing.assert_close(table.mean(k, x, eps), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("law", STOCHASTIC)
def test_equaliser_makes_all_gradients_equally_long(law: str) -> None:
    table = StepTable.build(law, shifted_sigmas(20, 5.0), eta=0.5, sde_window=(1, 19))
    norms = table.coef_v.abs() / table.std
    product = (table.equaliser() * norms)[1:19]
    torch.testing.assert_close(product, product[:1].expand(18))
    torch.testing.assert_close(product[0], norms[1:19].median())
    assert float(table.equaliser()[0]) == float(table.equaliser()[19]) == 1


def test_kl_is_that_of_two_gaussians() -> None:
    table = StepTable.build("sage", shifted_sigmas(10, 3.0), eta=0.5)
    a, b = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    steps = torch.tensor([1, 4, 4, 8])
    std = table.std[steps].float().view(-1, 1, 1).expand(4, 3, 2)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, std), normal(b, std)).flatten(1).mean(1)
    torch.testing.assert_close(table.kl(steps, a, b), expected, atol=1e-6, rtol=1e-5)


def test_guidance_window_in_time_is_a_range_of_one_minus_sigma() -> None:
    sigmas = shifted_sigmas(8, 1.0)
    table = StepTable.build("dance", sigmas, eta=0.3, guidance=Guidance(scale=1.0, time_window=(0.5, 1.0)))
    assert table.guided_steps == [4, 5, 6, 7]
    with pytest.raises(StepTableError, match="no step begins"):
        StepTable.build("dance", sigmas, eta=0.3, guidance=Guidance(scale=1.0, time_window=(0.9, 1.0)))
    with pytest.raises(StepTableError, match="not both"):
        Guidance(scale=1.0, window=(0, 1), time_window=(0.5, 1.0))


@pytest.mark.parametrize("law", ["dance", "flow_grpo", "sage"])
def test_laws_keep_the_marginals_of_a_gaussian_flow(law: str) -> None:
    """Data ~ N(m, s^2): the velocity is known, so each law's samples must have that mean and variance at the end."""
    m, s, steps = 1.5, 0.6, 400
    sigmas = shifted_sigmas(steps, 1.0)
    sigmas[0] = 0.999  # at 1 the velocity's score part has no weight; start a hair inside, where it is exact
    eta = 0.5
    table = StepTable.build(law, sigmas, eta=eta, sde_window=(1, steps - 1))
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    start = float(sigmas[0])
    x = (1 - start) * (m + s * torch.randn(count, 1, generator=generator)) + start * torch.randn(
        count, 1, generator=generator
    )
    for k in range(steps):
        sigma = float(table.sigmas[k])
        variance = ((1 - sigma) * s) ** 2 + sigma**2
        centred = x - (1 - sigma) * m
        # E[eps - x0 | x] of the Gaussian pair (x0, eps).
        v = (sigma - (1 - sigma) * s**2) / variance * centred - m
        x = table.sample(k, table.mean(k, x, v), torch.randn(count, 1, generator=generator))
    assert float(x.mean()) == pytest.approx(m, abs=0.02)
    assert float(x.std()) == pytest.approx(s, rel=0.03)

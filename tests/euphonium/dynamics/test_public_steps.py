"""The step table against recorded runs of public samplers, every step of every run.

``data/public_steps.npz`` holds numbers only. ``meta`` (JSON) names for each run the repository, commit and function
that computed it, and its law, eta, shift, number of steps and arithmetic. Runs share their inputs ``SHAPE.x``,
``SHAPE.v`` and unit noise ``SHAPE.z`` of shape ``[step, batch, ...]``; run N has ``N.sigmas`` as its source used them,
and per step ``N.mean``, ``N.x_next`` (drawn by the source with that noise), ``N.log_prob`` of ``N.x_next``, and
``N.std`` as the source reports it.

Tolerances are those of float32, in which nearly all sources compute: 2e-6 for means and samples, 5e-6 for
log-probabilities, 3e-7 for standard deviations. Runs of kind ``finding`` are not parity: each has a test of its own,
which says in what the source departs and by how much.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from euphonium.dynamics import Guidance, StepTable, StepTableError, shifted_sigmas

PUBLIC = np.load(Path(__file__).parent / "data" / "public_steps.npz")
RUNS: list[dict[str, Any]] = json.loads(str(PUBLIC["meta"]))
PARITY = [run for run in RUNS if run["kind"] == "parity"]
EQUALISED = [run for run in RUNS if run.get("equaliser")]
STATE_TOLERANCE, LOG_PROB_TOLERANCE, STD_TOLERANCE = 2e-6, 5e-6, 3e-7


def name(run: dict[str, Any]) -> str:
    return f"{run['repository'].split('/')[1]}-{run['law']}-T{run['steps']}-{run['id']}"


def read(run: dict[str, Any], key: str) -> Tensor:
    return torch.from_numpy(PUBLIC[f"{run['id']}.{key}"])


def inputs(run: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """States, velocities and unit noise, ``[step, batch, ...]``."""
    x, v, z = (torch.from_numpy(PUBLIC[f"{run['inputs']}.{key}"]) for key in ("x", "v", "z"))
    return x, v, z


def table(run: dict[str, Any]) -> StepTable:
    if run["law"] == "ddim":
        return StepTable.build_ddim(read(run, "alphas"), read(run, "times"), eta=run["eta"])
    return StepTable.build(run["law"], read(run, "sigmas"), eta=run["eta"])


def finding(mark: str) -> list[dict[str, Any]]:
    found = [run for run in RUNS if run.get("finding") == mark]
    assert found
    return found


def compared_steps(run: dict[str, Any]) -> range:
    """All steps, but for the first of SAGE-GRPO: see ``test_sage_grpos_first_step``."""
    return range(1 if run["law"] == "sage" else 0, run["steps"])


def reported_std(run: dict[str, Any], t: StepTable) -> Tensor:
    """The source's standard deviations of the transition.

    Finding: under one name, ``std_dev_t``, Flow-GRPO, verl-omni (``sde``), Flow-Factory (SDE laws) and SAGE-GRPO
    (``flow_grpo``) return the diffusion coefficient, which lacks the factor ``sqrt(delta)``, while their other laws
    return the transition's. A divergence that divides by its square is off by delta.
    """
    reported = read(run, "std").double()
    return reported * (t.sigmas[:-1] - t.sigmas[1:]).sqrt() if run["reported_std"] == "coefficient" else reported


def test_the_recorded_runs_cover_the_laws_and_their_sources() -> None:
    sources: dict[str, set[str]] = {}
    for run in PARITY:
        sources.setdefault(run["law"], set()).add(run["repository"])
        assert len(run["commit"]) == 40
    assert {law: len(s) for law, s in sources.items()} == {"dance": 6, "flow_grpo": 5, "cps": 5, "sage": 1, "ddim": 1}


@pytest.mark.parametrize("run", PARITY, ids=name)
def test_means_samples_and_log_probabilities_are_the_source_s(run: dict[str, Any]) -> None:
    t = table(run)
    x, v, z = inputs(run)
    mean, x_next, log_prob = (read(run, key) for key in ("mean", "x_next", "log_prob"))
    for k in compared_steps(run):
        ours = t.mean(k, x[k], v[k])
        torch.testing.assert_close(ours, mean[k], atol=STATE_TOLERANCE, rtol=0)
        if run.get("guidance_scale") is None:
            torch.testing.assert_close(t.sample(k, ours, z[k]), x_next[k], atol=STATE_TOLERANCE, rtol=0)
        if run["log_prob"] == "gaussian":
            scored = t.log_prob(k, x_next[k], ours)
        else:
            # Sources of CPS leave out the constants and the variance; the residual is what they share with a Gaussian.
            assert run["log_prob"] == "minus mean squared residual"
            scored = -(x_next[k] - ours).square().flatten(1).mean(1)
        torch.testing.assert_close(scored, log_prob[k], atol=LOG_PROB_TOLERANCE, rtol=0)


@pytest.mark.parametrize("run", [r for r in PARITY if r["reported_std"] != "none"], ids=name)
def test_standard_deviations_are_the_source_s(run: dict[str, Any]) -> None:
    t = table(run)
    kept = list(compared_steps(run))
    torch.testing.assert_close(reported_std(run, t)[kept], t.std[kept], atol=STD_TOLERANCE, rtol=0)


def test_guided_samples_and_both_scores_are_the_source_s() -> None:
    """Euphonium with lambda: the sample under the guided mean, scored under the unguided and the guided mean."""
    (run,) = [r for r in PARITY if r.get("guidance_scale") is not None]
    guidance = Guidance(scale=run["guidance_scale"])
    t = StepTable.build("dance", read(run, "sigmas"), eta=run["eta"], guidance=guidance)
    x, v, z = inputs(run)
    gradient = torch.from_numpy(PUBLIC["video.reward_gradient"])
    for k in range(t.num_steps):
        guided = t.mean(k, x[k], v[k], gradient[k])
        x_next = read(run, "x_next")[k]
        torch.testing.assert_close(t.sample(k, guided, z[k]), x_next, atol=STATE_TOLERANCE, rtol=0)
        for mean, key in ((t.mean(k, x[k], v[k]), "log_prob"), (guided, "guided_log_prob")):
            scored = t.log_prob(k, x_next, mean)
            torch.testing.assert_close(scored, read(run, key)[k], atol=LOG_PROB_TOLERANCE, rtol=0)


@pytest.mark.parametrize("run", EQUALISED, ids=name)
def test_equaliser_is_sage_grpos(run: dict[str, Any]) -> None:
    """``S_k`` for every law.

    Finding: at the last step of CPS, which has no noise, SAGE-GRPO divides by 1e-12 and scales the loss to nothing;
    such a step has no likelihood here, and weight 1. Its step 0 of ``sage`` carries the clamp of
    ``test_sage_grpos_first_step``.
    """
    t = table(run)
    theirs, ours = read(run, "equaliser"), t.equaliser()
    kept = [k for k in compared_steps(run) if float(t.std[k]) > 0]
    torch.testing.assert_close(ours[kept], theirs[kept], atol=0, rtol=2e-7)
    if run["law"] == "cps":
        assert float(theirs[-1]) < 1e-11
        assert float(ours[-1]) == 1


@pytest.mark.parametrize("run", [r for r in PARITY if r["law"] == "sage"], ids=name)
def test_sage_grpos_first_step(run: dict[str, Any]) -> None:
    """Finding: SAGE-GRPO clamps sigma = 1 to 0.997 inside the logarithm but not in the interval that it subtracts.

    Its variance is smaller than the integral by ``eta^2 (1 - 0.997)``: here a 0.1 % smaller deviation.
    """
    t = table(run)
    theirs, ours = float(read(run, "std")[0]), float(t.std[0])
    # In float32 its 1 - 0.997 is 0.00300002.
    assert (ours**2 - theirs**2) / run["eta"] ** 2 == pytest.approx(0.003, abs=1e-5)
    assert 0 < ours / theirs - 1 < 2e-3


@pytest.mark.parametrize("run", finding("sage-nan"), ids=name)
def test_sage_grpos_first_step_on_fine_grids(run: dict[str, Any]) -> None:
    """Finding: the same clamp makes SAGE-GRPO's first variance negative on fine or strongly shifted grids.

    Its standard deviation was NaN in these runs. Here the law is either defined or refused by name.
    """
    assert math.isnan(float(read(run, "std")))
    sigmas = shifted_sigmas(run["steps"], run["shift"])
    if float(sigmas[1]) < 0.997:
        assert float(StepTable.build("sage", sigmas, eta=run["eta"]).std[0]) > 0
    else:
        with pytest.raises(StepTableError, match="step 0 of law 'sage'"):
            StepTable.build("sage", sigmas, eta=run["eta"])


def test_unirls_default_sigma_max() -> None:
    """Finding: UniRL's ``FlowSDEStrategy`` replaces sigma = 1 by 0.99 unless it is told sigma_1.

    Its first step then has ``V = 100 eta^2 delta`` where Flow-GRPO has ``eta^2 delta / (1 - sigma_1)``; rollout and
    trainer must agree on it. All other steps agree.
    """
    (run,) = finding("sigma-max")
    t = table(run)
    x, v, z = inputs(run)
    mean, x_next = read(run, "mean"), read(run, "x_next")
    for k in range(1, run["steps"]):
        torch.testing.assert_close(t.mean(k, x[k], v[k]), mean[k], atol=STATE_TOLERANCE, rtol=0)
    std = float(((x_next - mean)[0] / z[0]).median())
    delta = float(t.sigmas[0] - t.sigmas[1])
    assert std == pytest.approx(run["eta"] * math.sqrt(delta / 0.01), rel=1e-5)
    assert std / float(t.std[0]) == pytest.approx(math.sqrt((1 - float(t.sigmas[1])) / 0.01), rel=1e-5)


def test_flow_grpos_wan_sampler_is_another_law() -> None:
    """Finding: what Flow-GRPO and FlowCPS call SDE for Wan is not their law for SD3.

    It has no eta: ``V = c^2 delta`` with ``c = sigma_T + (sigma_1 - sigma_T) sigma``, which is ``dance`` with a noise
    level that changes from step to step.
    """
    (run,) = finding("wan-law")
    sigmas = read(run, "sigmas")
    x, v, z = inputs(run)
    for k in range(run["steps"]):
        eta = float(sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigmas[k])
        t = StepTable.build("dance", sigmas, eta=eta)
        mean = t.mean(k, x[k], v[k])
        torch.testing.assert_close(mean, read(run, "mean")[k], atol=STATE_TOLERANCE, rtol=0)
        torch.testing.assert_close(t.sample(k, mean, z[k]), read(run, "x_next")[k], atol=STATE_TOLERANCE, rtol=0)
        scored = t.log_prob(k, read(run, "x_next")[k], mean)
        torch.testing.assert_close(scored, read(run, "log_prob")[k], atol=LOG_PROB_TOLERANCE, rtol=0)
        assert float(read(run, "std")[k]) == pytest.approx(float(t.std[k]), abs=STD_TOLERANCE)


def test_scores_through_predicted_data_lose_digits_near_data() -> None:
    """Finding: ``(x - (1 - sigma) x0hat) / sigma^2`` in float32 cancels where sigma is small.

    DanceGRPO's form of the score, here as verl-omni has it, on diffusers' own grid, whose last sigma is 0.001: its
    mean is 1.6e-5 and its log-probability 8.5e-5 away from the exact ones, close to the clip range of 1e-4. The
    table's ``a x + b v`` divides by sigma once, in float64.
    """
    (run,) = finding("score-cancellation")
    t = table(run)
    x, v, _ = inputs(run)
    last = run["steps"] - 1
    assert float(t.sigmas[last]) == pytest.approx(1e-3)
    for k in range(last):
        torch.testing.assert_close(t.mean(k, x[k], v[k]), read(run, "mean")[k], atol=STATE_TOLERANCE, rtol=0)
    sigma, delta = float(t.sigmas[last]), float(t.sigmas[last] - t.sigmas[last + 1])
    states, velocities = x[last].double(), v[last].double()
    score = -(states - (states - sigma * velocities) * (1 - sigma)) / sigma**2
    exact = states - delta * velocities + run["eta"] ** 2 * delta / 2 * score
    error = (read(run, "mean")[last] - exact).abs().max()
    assert 1e-5 < float(error) < 3e-5
    assert float((t.mean(last, x[last], v[last]) - exact).abs().max()) < 3e-7
    shift = (t.log_prob(last, read(run, "x_next")[last], exact) - read(run, "log_prob")[last]).abs().max()
    assert 5e-5 < float(shift) < 1e-4

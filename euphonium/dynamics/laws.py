"""The transition laws of stochastic samplers: for each, the numbers ``a_k, b_k, std_k`` of every step.

No other file knows a formula of a sampler. A law is a function of the grid of noise levels and of the noise level
eta, in float64; a new one is a function here and an entry in ``LAWS``. Conventions are those of
:mod:`euphonium.dynamics.step_table`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# SAGE integrates sigma / (1 - sigma), which diverges at sigma = 1. The clamp is applied to both ends of the
# interval: clamping only inside the logarithm makes the variance negative on fine or strongly shifted grids.
SAGE_SIGMA_MAX = 0.997


class StepTableError(ValueError):
    """Impossible settings of a sampler, a step whose numbers are undefined, or a use that its law does not allow."""


class Columns(NamedTuple):
    """Coefficients and noise of every step of a law, float64 ``[num_steps]`` each.

    Attributes:
        coef_x: a_k, coefficient of the state.
        coef_v: b_k, coefficient of the network's output.
        std: standard deviation of the transition.
    """

    coef_x: Tensor
    coef_v: Tensor
    std: Tensor


Law = Callable[[Tensor, float], Columns]


def _variance_dance(sigmas: Tensor, eta: float) -> Tensor:
    """DanceGRPO: ``V = eta^2 delta``; Euphonium's Eq. 14 with ``eps = eta^2 / 2``."""
    return eta**2 * (sigmas[:-1] - sigmas[1:])


def _variance_flow_grpo(sigmas: Tensor, eta: float) -> Tensor:
    """Flow-GRPO: ``V = eta^2 sigma / (1 - sigma) delta``; at sigma = 1 the denominator uses sigma_1."""
    sigma = sigmas[:-1]
    finite = torch.where(sigma == 1, sigmas[1], sigma)
    return eta**2 * sigma / (1 - finite) * (sigma - sigmas[1:])


def _variance_flow_grpo_wan(sigmas: Tensor, eta: float) -> Tensor:
    """Flow-GRPO's sampler for Wan: ``V = (eta s)^2 delta``, s linear in sigma from its last level to its second one."""
    return (eta * (sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigmas[:-1])) ** 2 * (sigmas[:-1] - sigmas[1:])


def _variance_sage(sigmas: Tensor, eta: float) -> Tensor:
    """SAGE-GRPO Eq. 5: the integral of Flow-GRPO's ``eta^2 sigma / (1 - sigma)`` over the step."""
    clamped = sigmas.clamp(max=SAGE_SIGMA_MAX)
    upper, lower = clamped[:-1], clamped[1:]
    return eta**2 * (torch.log((1 - lower) / (1 - upper)) - (upper - lower))


def _marginal_preserving(variance: Callable[[Tensor, float], Tensor]) -> Law:
    """The law ``mean = x - delta v + V/2 score`` with ``score = -(x + (1 - sigma) v) / sigma``, for variances V."""

    def law(sigmas: Tensor, eta: float) -> Columns:
        sigma, delta = sigmas[:-1], sigmas[:-1] - sigmas[1:]
        v = variance(sigmas, eta)
        coef_x = 1 - v / (2 * sigma)
        coef_v = -delta - v * (1 - sigma) / (2 * sigma)
        return Columns(coef_x, coef_v, v.clamp(min=0).sqrt().where(v >= 0, torch.nan))

    return law


def law_cps(sigmas: Tensor, eta: float) -> Columns:
    """Coefficients-preserving sampling: ``(1 - sigma') x0hat + sqrt(sigma'^2 - std^2) x1hat`` plus noise."""
    sigma, target = sigmas[:-1], sigmas[1:]
    std = target * math.sin(eta * math.pi / 2)
    kept = (target**2 - std**2).clamp(min=0).sqrt()
    coef_x = (1 - target) + kept
    coef_v = -sigma * (1 - target) + kept * (1 - sigma)
    return Columns(coef_x, coef_v, std)


def law_ode(sigmas: Tensor, eta: float) -> Columns:
    """Euler's step of the probability-flow ODE, without noise."""
    delta = sigmas[:-1] - sigmas[1:]
    return Columns(torch.ones_like(delta), -delta, torch.zeros_like(delta))


def law_ddim(alphas: Tensor, eta: float) -> Columns:
    """DDIM for noise prediction; DanceGRPO's Eq. 2 is its step without noise, and Eq. 7 agrees with it to first order.

    Args:
        alphas: cumulative products of the signal, rising towards data, ``[num_steps + 1]``.
        eta: 0 < eta; at 1 the variance is that of the ancestral sampler.
    """
    alpha, target = alphas[:-1], alphas[1:]
    std = eta * ((1 - target) / (1 - alpha) * (1 - alpha / target)).clamp(min=0).sqrt()
    coef_x = (target / alpha).sqrt()
    kept = (1 - target - std**2).sqrt()
    return Columns(coef_x, kept - coef_x * (1 - alpha).sqrt(), std)


LAWS: dict[str, Law] = {
    "ode": law_ode,
    "dance": _marginal_preserving(_variance_dance),
    "flow_grpo": _marginal_preserving(_variance_flow_grpo),
    "flow_grpo_wan": _marginal_preserving(_variance_flow_grpo_wan),
    "sage": _marginal_preserving(_variance_sage),
    "cps": law_cps,
}


def checked_grid(sigmas: Tensor) -> Tensor:
    """Copies noise levels ``[num_steps + 1]`` to float64 on the CPU, and checks them.

    Raises:
        StepTableError: they do not fall strictly from at most 1 to at least 0.
    """
    grid = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu().clone()
    if grid.dim() != 1 or grid.shape[0] < 2:
        raise StepTableError(f"sigmas must have shape [num_steps + 1] with at least one step, got {list(grid.shape)}")
    if not bool(torch.isfinite(grid).all()) or float(grid[0]) > 1 or float(grid[-1]) < 0:
        raise StepTableError("sigmas must be finite and lie in [0, 1]")
    for k, falls in enumerate((grid[1:] < grid[:-1]).tolist()):
        if not falls:
            raise StepTableError(
                f"sigmas must fall strictly, but at step {k} they go from {float(grid[k])} to {float(grid[k + 1])}"
            )
    return grid


def check_steps(law: str, sigmas: Tensor, columns: Columns, steps: range) -> None:
    """Checks the numbers of the steps that follow a law.

    Raises:
        StepTableError: a number that is not finite, or a variance that is not positive; the message names the step.
    """
    std = columns.std
    last = len(std) - 1
    for k in steps:
        where = f"step {k} of law {law!r} (sigma {float(sigmas[k]):.6g} -> {float(sigmas[k + 1]):.6g})"
        if not all(math.isfinite(float(column[k])) for column in columns):
            raise StepTableError(f"{where} has an undefined mean or a negative variance; use another grid or law")
        # The last step of CPS and DDIM lands on data, without noise: legal, but never part of the likelihood.
        if law != "ode" and float(std[k]) <= 0 and not (law in ("cps", "ddim") and k == last):
            raise StepTableError(
                f"{where} has no positive variance; take fewer steps or a smaller shift, so that the step is longer"
            )

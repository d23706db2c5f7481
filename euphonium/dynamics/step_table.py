"""Every sampler as one table of numbers per step.

A sampling step is a Gaussian whose mean is linear in the state, the velocity and the reward gradient::

    x_{k+1} ~ N(mean_k, std_k^2 I),   mean_k = a_k x_k + b_k v_k + g_k grad_x r(x_k, sigma_k)

so a sampler *is* the numbers ``a, b, std, g``. They are computed here, once, in float64; sampling, log-probability,
guidance and the temporal equaliser read the table, and no other module knows a formula of a sampler.

Diffusion models that predict the noise fit the same form, with their output in the place of the velocity.

Conventions: ``sigma`` is the noise fraction, falling from 1 (noise) to 0 (data); ``x_sigma = (1 - sigma) x0 +
sigma eps``; the velocity is ``v = eps - x0``; step k leads from ``sigma_k`` to ``sigma_{k+1} = sigma_k - delta_k``.
``std`` is always the standard deviation of the transition, never a diffusion coefficient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# SAGE integrates sigma / (1 - sigma), which diverges at sigma = 1. The clamp is applied to both ends of the
# interval: clamping only inside the logarithm makes the variance negative on fine or strongly shifted grids.
SAGE_SIGMA_MAX = 0.997


class StepTableError(ValueError):
    """A sampler that cannot be: a step whose numbers are undefined, or a use that the law does not allow."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Strength and window of the reward-gradient guidance.

    Exactly one of ``scale`` and ``beta`` is given.

    Attributes:
        scale: lambda of Euphonium's Eq. 20: the drift gains ``lambda grad r``, so ``g_k = lambda delta_k``.
        beta: KL weight of Eq. 12: ``g_k = V_k / (2 beta)``, the paper's ``eps delta / beta``.
        window: half-open range of steps ``(start, stop)`` in which guidance acts; None means every step.
        time_window: the same as a range of ``t = 1 - sigma``, the papers' time from noise (0) to data (1).
    """

    scale: float | None = None
    beta: float | None = None
    window: tuple[int, int] | None = None
    time_window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.time_window is not None:
            raise StepTableError("guidance takes a window in steps or in time, not both")
        if (self.scale is None) == (self.beta is None):
            raise StepTableError("guidance takes exactly one of scale (lambda) and beta")
        if self.scale is not None and not math.isfinite(self.scale):
            raise StepTableError(f"guidance scale must be finite, got {self.scale}")
        if self.beta is not None and not (self.beta > 0 and math.isfinite(self.beta)):
            raise StepTableError(f"guidance beta must be positive and finite, got {self.beta}")

    def coefficients(self, sigmas: Tensor, variance: Tensor) -> Tensor:
        """``g_k`` of every step.

        Args:
            sigmas: ``[num_steps + 1]`` noise levels.
            variance: ``[num_steps]`` transition variances V_k.

        Returns:
            ``[num_steps]``, zero outside the window.
        """
        delta = sigmas[:-1] - sigmas[1:]
        window = self.window if self.time_window is None else _steps_in_time(sigmas, self.time_window)
        start, stop = _checked_window("guidance window", window, delta.shape[0])
        if self.beta is not None and bool((variance[start:stop] == 0).all()):
            raise StepTableError("guidance by beta needs a stochastic law: V_k is 0 in the whole window; give scale")
        strength = self.scale * delta if self.scale is not None else variance / (2 * (self.beta or 1.0))
        inside = torch.zeros_like(delta)
        inside[start:stop] = 1
        return strength * inside


def _variance_dance(sigmas: Tensor, eta: float) -> Tensor:
    """DanceGRPO: ``V = eta^2 delta``; Euphonium's Eq. 14 with ``eps = eta^2 / 2``."""
    return eta**2 * (sigmas[:-1] - sigmas[1:])


def _variance_flow_grpo(sigmas: Tensor, eta: float) -> Tensor:
    """Flow-GRPO: ``V = eta^2 sigma / (1 - sigma) delta``; at sigma = 1 the denominator uses sigma_1."""
    sigma = sigmas[:-1]
    finite = torch.where(sigma == 1, sigmas[1], sigma)
    return eta**2 * sigma / (1 - finite) * (sigma - sigmas[1:])


def _variance_sage(sigmas: Tensor, eta: float) -> Tensor:
    """SAGE-GRPO Eq. 5: the integral of Flow-GRPO's ``eta^2 sigma / (1 - sigma)`` over the step."""
    clamped = sigmas.clamp(max=SAGE_SIGMA_MAX)
    upper, lower = clamped[:-1], clamped[1:]
    return eta**2 * (torch.log((1 - lower) / (1 - upper)) - (upper - lower))


def _marginal_preserving(
    variance: Callable[[Tensor, float], Tensor],
) -> Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]:
    """The family ``mean = x - delta v + V/2 score`` with ``score = -(x + (1 - sigma) v) / sigma``."""

    def law(sigmas: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        sigma, delta = sigmas[:-1], sigmas[:-1] - sigmas[1:]
        v = variance(sigmas, eta)
        coef_x = 1 - v / (2 * sigma)
        coef_v = -delta - v * (1 - sigma) / (2 * sigma)
        return coef_x, coef_v, v.clamp(min=0).sqrt().where(v >= 0, torch.nan)

    return law


def _law_cps(sigmas: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients-preserving sampling: ``(1 - sigma') x0hat + sqrt(sigma'^2 - std^2) x1hat`` plus noise."""
    sigma, target = sigmas[:-1], sigmas[1:]
    std = target * math.sin(eta * math.pi / 2)
    kept = (target**2 - std**2).clamp(min=0).sqrt()
    coef_x = (1 - target) + kept
    coef_v = -sigma * (1 - target) + kept * (1 - sigma)
    return coef_x, coef_v, std


def _law_ode(sigmas: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Euler's step of the probability-flow ODE: no noise."""
    delta = sigmas[:-1] - sigmas[1:]
    return torch.ones_like(delta), -delta, torch.zeros_like(delta)


def _law_ddim(alphas: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """DDIM for noise prediction; DanceGRPO's Eq. 7 is its step without noise.

    Args:
        alphas: cumulative products of the signal, rising towards data, ``[num_steps + 1]``.
        eta: 0 < eta; at 1 the variance is that of the ancestral sampler.
    """
    alpha, target = alphas[:-1], alphas[1:]
    std = eta * ((1 - target) / (1 - alpha) * (1 - alpha / target)).clamp(min=0).sqrt()
    coef_x = (target / alpha).sqrt()
    kept = (1 - target - std**2).sqrt()
    return coef_x, kept - coef_x * (1 - alpha).sqrt(), std


LAWS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]] = {
    "ode": _law_ode,
    "dance": _marginal_preserving(_variance_dance),
    "flow_grpo": _marginal_preserving(_variance_flow_grpo),
    "sage": _marginal_preserving(_variance_sage),
    "cps": _law_cps,
}


@dataclass(frozen=True, eq=False)
class StepTable:
    """The numbers of one sampler; build it with :meth:`build` or, for noise prediction, :meth:`build_ddim`.

    Attributes:
        law: name of the law.
        sigmas: float64 ``[num_steps + 1]``, noise levels: the noise fraction of flow matching, and
            ``sqrt(1 - alpha_bar)`` of diffusion.
        times: float64 ``[num_steps]``, what the network is told at each step, as a fraction of its range.
        predicts_noise: whether the network's output is the noise instead of the velocity.
        coef_x: float64 ``[num_steps]``, a_k.
        coef_v: float64 ``[num_steps]``, b_k.
        std: float64 ``[num_steps]``, standard deviation of the transition.
        coef_grad: float64 ``[num_steps]``, g_k.
    """

    law: str
    sigmas: Tensor
    times: Tensor
    predicts_noise: bool
    coef_x: Tensor
    coef_v: Tensor
    std: Tensor
    coef_grad: Tensor

    @classmethod
    def build(
        cls,
        law: str,
        sigmas: Tensor,
        *,
        eta: float | None = None,
        guidance: Guidance | None = None,
        sde_window: tuple[int, int] | None = None,
    ) -> StepTable:
        """Computes the table of a law on a grid.

        Args:
            law: a key of ``LAWS``.
            sigmas: ``[num_steps + 1]``, strictly falling from at most 1 to at least 0.
            eta: noise level > 0 of the stochastic laws; ``cps`` takes at most 1; ``ode`` takes none.
            guidance: reward-gradient guidance; composes with every law.
            sde_window: half-open range of steps that follow the law; the others are steps of the ODE (MixGRPO).
                ``(0, num_steps - 1)`` ends on the predicted data instead of on data plus noise.

        Raises:
            StepTableError: an unknown law, a grid or noise level outside its range, or a step whose variance is
                not positive or whose numbers are not finite; the message names the step.
        """
        if law not in LAWS:
            raise StepTableError(f"unknown law {law!r}; known are {', '.join(LAWS)} (and ddim, see build_ddim)")
        grid = _checked_grid(sigmas)
        if law == "ode":
            if eta is not None:
                raise StepTableError("the law 'ode' is deterministic and takes no eta")
        elif eta is None or not (eta > 0 and math.isfinite(eta)):
            raise StepTableError(f"the law {law!r} needs eta > 0, got {eta}")
        elif law == "cps" and eta > 1:
            raise StepTableError(f"the law 'cps' needs eta in (0, 1], got {eta}: std is sigma' sin(eta pi/2)")
        columns = LAWS[law](grid, eta or 0.0)
        return cls._assemble(law, grid, None, columns, _law_ode(grid, 0.0), guidance, sde_window)

    @classmethod
    def build_ddim(
        cls,
        alphas: Tensor,
        times: Tensor,
        *,
        eta: float | None = None,
        guidance: Guidance | None = None,
        sde_window: tuple[int, int] | None = None,
    ) -> StepTable:
        """Computes the table of DDIM for a model that predicts the noise.

        Args:
            alphas: ``[num_steps + 1]`` cumulative signal products in (0, 1], rising towards data, of the model's own
                schedule.
            times: ``[num_steps]`` what the network is told, as a fraction of its range.
            eta: noise level > 0; None gives the deterministic sampler.
            guidance: as for :meth:`build`; a step's length is the fall of ``sqrt(1 - alpha)``.
            sde_window: as for :meth:`build`.

        Raises:
            StepTableError: as for :meth:`build`.
        """
        rising = torch.as_tensor(alphas, dtype=torch.float64).detach().cpu().clone()
        grid = _checked_grid((1 - rising).clamp(min=0).sqrt())
        if eta is not None and not (eta > 0 and math.isfinite(eta)):
            raise StepTableError(f"the law 'ddim' needs eta > 0, got {eta}")
        deterministic = _law_ddim(rising, 0.0)
        columns = deterministic if eta is None else _law_ddim(rising, eta)
        law = "ode" if eta is None else "ddim"
        told = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
        if told.shape != (len(grid) - 1,):
            raise StepTableError(f"times must have shape [{len(grid) - 1}], got {list(told.shape)}")
        return cls._assemble(law, grid, told, columns, deterministic, guidance, sde_window)

    @classmethod
    def _assemble(
        cls,
        law: str,
        grid: Tensor,
        times: Tensor | None,
        columns: tuple[Tensor, Tensor, Tensor],
        deterministic: tuple[Tensor, Tensor, Tensor],
        guidance: Guidance | None,
        sde_window: tuple[int, int] | None,
    ) -> StepTable:
        start, stop = _checked_window("sde_window", sde_window, len(grid) - 1)
        inside = torch.zeros(len(grid) - 1, dtype=torch.bool)
        inside[start:stop] = True
        coef_x, coef_v, std = (
            torch.where(inside, column, ode) for column, ode in zip(columns, deterministic, strict=True)
        )
        _check_steps(law, grid, coef_x, coef_v, std, range(start, stop))
        delta = grid[:-1] - grid[1:]
        coef_grad = torch.zeros_like(delta) if guidance is None else guidance.coefficients(grid, std**2)
        told = grid[:-1] if times is None else times
        return cls(law, grid, told, times is not None, coef_x, coef_v, std, coef_grad)

    @property
    def num_steps(self) -> int:
        """Number of sampling steps T."""
        return self.std.shape[0]

    @property
    def stochastic_steps(self) -> list[int]:
        """Steps with noise: the only ones that have a likelihood and can be trained."""
        return [k for k in range(self.num_steps) if float(self.std[k]) > 0]

    @property
    def guided_steps(self) -> list[int]:
        """Steps at which the reward gradient enters the mean."""
        return [k for k in range(self.num_steps) if float(self.coef_grad[k]) != 0]

    def mean(self, k: int | Tensor, x: Tensor, v: Tensor, reward_gradient: Tensor | None = None) -> Tensor:
        """Mean of the transition, ``a_k x + b_k v + g_k grad``.

        Args:
            k: step, or steps ``[batch]`` (int64), one a sample.
            x: states ``[batch, ...]``.
            v: velocities, like ``x``.
            reward_gradient: ``grad_x r(x_k, sigma_k)``, like ``x``; None scores or samples without guidance.

        Returns:
            float32, like ``x``.
        """
        x, v = x.float(), v.float()
        mean = _pick(self.coef_x, k, x) * x + _pick(self.coef_v, k, x) * v
        if reward_gradient is not None:
            mean = mean + _pick(self.coef_grad, k, x) * reward_gradient.float()
        return mean

    def sample(self, k: int, mean: Tensor, noise: Tensor) -> Tensor:
        """Next state ``mean + std_k noise``; float32, like ``mean``."""
        return mean + _pick(self.std, k, mean) * noise.float()

    def predicted_data(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        """The data that the network sees behind a state: one deterministic step to noise level 0; float32."""
        sigma = float(self.sigmas[k])
        if self.predicts_noise:
            return (x.float() - sigma * v.float()) / math.sqrt(1 - sigma**2)
        return x.float() - sigma * v.float()

    def log_prob(self, k: int | Tensor, x_next: Tensor, mean: Tensor) -> Tensor:
        """Gaussian log-density of the transition, averaged over all non-batch dimensions.

        The mean, not the sum, is what every public implementation takes and what clip ranges of 1e-4 presume.
        Pass the next state as it is stored: rounding it afterwards shifts the result by more than the clip range.

        Args:
            k: step, or steps ``[batch]``, one a sample.
            x_next: next states ``[batch, ...]``.
            mean: means, like ``x_next``.

        Returns:
            float32 ``[batch]``.

        Raises:
            StepTableError: a step without noise, which has no density.
        """
        steps = [k] if isinstance(k, int) else sorted(set(k.tolist()))
        for step in steps:
            if float(self.std[step]) == 0:
                raise StepTableError(f"step {step} of law {self.law!r} has no noise, so no log-probability")
        std = _pick(self.std, k, mean)
        z = (x_next.float() - mean.float()) / std
        density = -0.5 * z.square() - torch.log(torch.as_tensor(std, dtype=torch.float32)) - _HALF_LOG_2PI
        return density.flatten(1).mean(dim=1)

    def kl(self, k: int | Tensor, mean: Tensor, reference: Tensor) -> Tensor:
        """KL divergence of two transitions of this law, averaged over all non-batch dimensions.

        Both have the variance V_k, so it is ``mean((mean - reference)^2) / (2 V_k)`` in either direction.

        Args:
            k: step, or steps ``[batch]``, one a sample.
            mean: means ``[batch, ...]`` under one policy.
            reference: under the other.

        Returns:
            float32 ``[batch]``.
        """
        std = _pick(self.std, k, mean)
        return ((mean.float() - reference.float()) / std).square().flatten(1).mean(dim=1) / 2

    def equaliser(self) -> Tensor:
        """Temporal gradient equaliser of SAGE-GRPO (Eq. 9): ``S_k = median(N) / N_k`` with ``N_k = |b_k| / std_k``.

        ``N_k`` is the length of the log-probability's gradient with respect to the velocity, per unit of noise. The
        median (the lower one of two) is over the stochastic steps.

        Returns:
            float64 ``[num_steps]``, 1 at steps without noise.
        """
        stochastic = self.std > 0
        norms = self.coef_v.abs()[stochastic] / self.std[stochastic]
        scale = torch.ones_like(self.std)
        scale[stochastic] = norms.median() / norms
        return scale

    def fingerprint(self) -> str:
        """Hash of all numbers of the table: two roles with equal fingerprints speak of the same sampler."""
        digest = hashlib.sha256(self.law.encode())
        for tensor in (self.sigmas, self.times, self.coef_x, self.coef_v, self.std, self.coef_grad):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _pick(column: Tensor, k: int | Tensor, like: Tensor) -> Tensor:
    """Numbers of step(s) ``k`` in float32, shaped to broadcast over ``like``."""
    chosen = column[k].to(device=like.device, dtype=torch.float32)
    return chosen.reshape(chosen.shape + (1,) * (like.dim() - chosen.dim()))


def _steps_in_time(sigmas: Tensor, window: tuple[float, float]) -> tuple[int, int]:
    times = 1 - sigmas[:-1]
    inside = [k for k, t in enumerate(times.tolist()) if window[0] <= t <= window[1]]
    if not inside:
        shown = ", ".join(f"{t:.3f}" for t in times.tolist())
        raise StepTableError(f"no step begins in the guidance's time window {window}; steps begin at t = {shown}")
    return inside[0], inside[-1] + 1


def _checked_window(name: str, window: tuple[int, int] | None, num_steps: int) -> tuple[int, int]:
    start, stop = window if window is not None else (0, num_steps)
    if not 0 <= start < stop <= num_steps:
        raise StepTableError(f"{name} ({start}, {stop}) is not a range of the {num_steps} steps 0..{num_steps - 1}")
    return start, stop


def _checked_grid(sigmas: Tensor) -> Tensor:
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


def _check_steps(law: str, sigmas: Tensor, coef_x: Tensor, coef_v: Tensor, std: Tensor, steps: range) -> None:
    last = len(std) - 1
    for k in steps:
        where = f"step {k} of law {law!r} (sigma {float(sigmas[k]):.6g} -> {float(sigmas[k + 1]):.6g})"
        if not all(math.isfinite(float(column[k])) for column in (coef_x, coef_v, std)):
            raise StepTableError(f"{where} has an undefined mean or a negative variance; use another grid or law")
        # The last step of CPS and DDIM lands on data, without noise: legal, but never part of the likelihood.
        if law != "ode" and float(std[k]) <= 0 and not (law in ("cps", "ddim") and k == last):
            raise StepTableError(
                f"{where} has no positive variance; take fewer steps or a smaller shift, so that the step is longer"
            )

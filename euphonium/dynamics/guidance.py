"""Guidance by the reward gradient: how strong it is, and at which steps it acts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from euphonium.dynamics.laws import StepTableError

# Times of two grids that differ by less are the same.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Strength and window of the reward-gradient guidance; exactly one of ``scale`` and ``beta`` is given.

    Attributes:
        scale: lambda of Euphonium's Eq. 20: the drift gains ``lambda grad r``, so ``g_k = lambda delta_k``.
        beta: KL weight of Eq. 12: ``g_k = V_k / (2 beta)``, the paper's ``eps delta / beta``.
        window: half-open range of steps ``(start, stop)`` in which guidance acts; None means every step.
        time_window: the same as a half-open range of ``t = 1 - sigma``, the papers' time from noise (0) to data (1):
            guidance acts in the steps that begin in it.
        every: guidance acts at every so many steps of the window, the first of them included; None for all of them.
        per_step: leave the step's length out, so that ``g_k = lambda`` (Euphonium's released trainer without
            ``use_delta_t_for_gradient_scaling``); only with ``scale``.

    Example:
        >>> sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)
        >>> Guidance(scale=2.0, window=(1, 3)).coefficients(sigmas, torch.zeros(3, dtype=torch.float64)).tolist()
        [0.0, 0.5, 1.0]
    """

    scale: float | None = None
    beta: float | None = None
    window: tuple[int, int] | None = None
    time_window: tuple[float, float] | None = None
    every: int | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.time_window is not None:
            raise StepTableError("guidance takes a window in steps or in time, not both")
        if (self.scale is None) == (self.beta is None):
            raise StepTableError("guidance takes exactly one of scale (lambda) and beta")
        if self.scale is not None and not math.isfinite(self.scale):
            raise StepTableError(f"guidance scale must be finite, got {self.scale}")
        if self.beta is not None and not (self.beta > 0 and math.isfinite(self.beta)):
            raise StepTableError(f"guidance beta must be positive and finite, got {self.beta}")
        if self.every is not None and self.every < 1:
            raise StepTableError(f"guidance acts at every step or at every n-th, n at least 1, got {self.every}")
        if self.beta is not None and self.per_step:
            raise StepTableError("scale_per: step is for guidance by scale; beta pushes as far as the step's variance")

    def coefficients(self, sigmas: Tensor, variance: Tensor) -> Tensor:
        """Coefficients ``g_k`` of the reward gradient in the mean of each step.

        Args:
            sigmas: ``[num_steps + 1]`` noise levels.
            variance: ``[num_steps]`` transition variances V_k.

        Returns:
            ``[num_steps]``, zero outside the window.

        Raises:
            StepTableError: an empty window, one beyond the steps, or ``beta`` with a law that has no noise in it.
        """
        delta = sigmas[:-1] - sigmas[1:]
        window = self.window if self.time_window is None else _steps_in_time(sigmas, self.time_window)
        start, stop = checked_window("guidance window", window, delta.shape[0])
        if self.beta is not None and bool((variance[start:stop] == 0).all()):
            raise StepTableError("guidance by beta needs a stochastic law: V_k is 0 in the whole window; give scale")
        if self.scale is not None:
            strength = self.scale * (torch.ones_like(delta) if self.per_step else delta)
        else:
            strength = variance / (2 * (self.beta or 1.0))
        inside = torch.zeros_like(delta)
        inside[start : stop : self.every] = 1
        return strength * inside


def _steps_in_time(sigmas: Tensor, window: tuple[float, float]) -> tuple[int, int]:
    times = 1 - sigmas[:-1]
    inside = [k for k, t in enumerate(times.tolist()) if window[0] - ROUNDING <= t < window[1] - ROUNDING]
    if not inside:
        shown = ", ".join(f"{t:.3f}" for t in times.tolist())
        raise StepTableError(f"no step begins in the guidance's time window {window}; steps begin at t = {shown}")
    return inside[0], inside[-1] + 1


def checked_window(name: str, window: tuple[int, int] | None, num_steps: int) -> tuple[int, int]:
    """A half-open range of steps; None means all of them.

    Raises:
        StepTableError: it is empty, or reaches beyond the steps; the message begins with ``name``.
    """
    start, stop = window if window is not None else (0, num_steps)
    if not 0 <= start < stop <= num_steps:
        raise StepTableError(
            f"{name} ({start}, {stop}) is not a range of the {num_steps} steps 0..{num_steps - 1}; give its first step "
            f"and the one after its last, at most {num_steps}"
        )
    return start, stop

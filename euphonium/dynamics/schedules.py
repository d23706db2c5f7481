"""Noise schedules: the grid of sigmas that a sampler walks from noise (1) to data (0)."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """Uniform grid of noise fractions under the time shift of flow-matching models.

    ``sigma' = s sigma / (1 + (s - 1) sigma)`` maps 1 to 1 and 0 to 0; a shift above 1 spends more steps near the
    noise. Equals the sigmas of diffusers' ``FlowMatchEulerDiscreteScheduler`` fed with
    ``linspace(1, 0, num_steps + 1)[:-1]``, which is what the HunyuanVideo pipeline feeds it.

    Args:
        num_steps: number of sampling steps T >= 1.
        shift: time shift s > 0; 1 leaves the grid uniform.

    Returns:
        float64 ``[num_steps + 1]``, strictly falling from 1 to 0.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive and finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
    # Rounding can put the first sigma a hair above 1.
    shifted[0] = 1.0
    return shifted

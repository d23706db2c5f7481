"""Noise levels of flow matching: the forward process, its time shift, and the grid of sigmas that a sampler walks.

``sigma`` is the noise fraction, 1 for noise and 0 for data. The steps from one sigma to the next, backwards, are
:mod:`euphonium.dynamics.step_table`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The forward process of flow matching: ``x_sigma = (1 - sigma) x0 + sigma noise``.

    >>> noised(torch.tensor([[4.0], [4.0]]), torch.tensor([[8.0], [8.0]]), torch.tensor([0.0, 0.75])).tolist()
    [[4.0], [7.0]]

    Args:
        x0: clean samples ``[batch, ...]``.
        noise: standard normal, of the same shape and type.
        sigma: noise fractions ``[batch]`` in [0, 1], of the same type.

    Returns:
        ``[batch, ...]``; exactly ``x0`` at 0 and ``noise`` at 1.
    """
    return torch.lerp(x0, noise, sigma.view(-1, *[1] * (x0.dim() - 1)))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The time shift of flow-matching models: ``sigma' = s sigma / (1 + (s - 1) sigma)``.

    It maps 0 to 0 and 1 to 1; a shift above 1 moves what lies between towards the noise.

    >>> shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist()
    [0.0, 0.75, 1.0]

    Args:
        sigma: noise fractions in [0, 1], of any shape.
        shift: s > 0; 1 changes nothing.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """Uniform grid of noise fractions under the time shift of :func:`shift_sigma`.

    Equals the sigmas of diffusers' ``FlowMatchEulerDiscreteScheduler`` fed with ``linspace(1, 0, num_steps + 1)[:-1]``,
    which is what the HunyuanVideo pipeline feeds it.

    >>> shifted_sigmas(4, 3.0).tolist()
    [1.0, 0.9, 0.75, 0.5, 0.0]

    Args:
        num_steps: number of sampling steps T >= 1.
        shift: time shift s > 0; 1 leaves the grid uniform, more spends more steps near the noise.

    Returns:
        float64 ``[num_steps + 1]``, strictly falling from 1 to 0.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive and finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    shifted = shift_sigma(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), shift)
    # Rounding can put the first sigma a hair above 1.
    shifted[0] = 1.0
    return shifted

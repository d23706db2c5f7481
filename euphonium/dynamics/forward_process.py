"""Objectives on finished samples that are noised again: DiffusionNFT (arXiv 2509.16117) and Diffusion-DPO (2311.12908).

Neither needs transitions or their likelihood, so any sampler may draw the samples, a deterministic one too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Errors of a sample that is predicted better than this no longer shrink the weight that divides its loss.
SMALLEST_ERROR = 1e-5


def optimality(advantages: Tensor, span: float) -> Tensor:
    """DiffusionNFT's r: how likely a sample is a good one, from 0 at an advantage of ``-span`` to 1 at ``span``."""
    return (advantages / (2 * span) + 0.5).clamp(0, 1)


def nft_loss(data: Tensor, predicted: Tensor, old: Tensor, good: Tensor, mixture: float) -> Tensor:
    """DiffusionNFT's loss, in data space and with its adaptive weights.

    Two policies are implied by that which is trained and the old one: the positive ``(1 - beta) old + beta predicted``
    and the negative ``(1 + beta) old - beta predicted``. Each is drawn to the sample, by how good and how bad it is.
    The loss of each is divided by its own mean absolute error, as a constant, and by beta, so that beta leaves the
    gradient where both policies are one.

    Args:
        data: clean samples ``[rows, ...]``.
        predicted: the policy's estimates of them from noised ones, likewise.
        old: those of the old policy, without gradients.
        good: r, ``[components, rows]``.
        mixture: beta > 0.

    Returns:
        Losses like ``good``.

    Example:
        >>> data, old = torch.zeros(1, 2), torch.full((1, 2), 0.5)
        >>> for good in (0.0, 0.5, 1.0):
        ...     predicted = old.clone().requires_grad_(True)
        ...     nft_loss(data, predicted, old, torch.tensor([[good]]), mixture=0.1).sum().backward()
        ...     print([round(float(g), 4) for g in predicted.grad[0]])  # away from a bad sample, towards a good one
        [-1.0, -1.0]
        [0.0, 0.0]
        [1.0, 1.0]
    """
    positive = _weighted_error((1 - mixture) * old + mixture * predicted, data)
    negative = _weighted_error((1 + mixture) * old - mixture * predicted, data)
    return (good * positive + (1 - good) * negative) / mixture


def _weighted_error(predicted: Tensor, data: Tensor) -> Tensor:
    """Squared error over the mean absolute one, which counts as a constant, ``[rows]``."""
    error = (predicted - data).flatten(1)
    scale = error.detach().abs().mean(dim=1).clamp(min=SMALLEST_ERROR)
    return error.square().mean(dim=1) / scale


def dpo_margin(error: Tensor, reference: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """By how much the policy prefers the better sample of each pair, relative to the reference.

    ``beta / 2`` times how much more the better one's error has fallen than the other's. A pair is two rows that follow
    each other: two samples of a prompt, with the same noise at the same level.

    Args:
        error: mean squared errors of the policy's output, ``[rows]``.
        reference: those of the reference.
        advantages: which sample is the better one, ``[rows]``; a pair without one has margin 0 and no gradient.
        beta: weight of the divergence from the reference.

    Returns:
        ``[rows / 2]``; the loss of a pair is ``-log sigmoid(margin)``.

    Example:
        >>> error, reference = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])
        >>> dpo_margin(error, reference, torch.tensor([2.0, -2.0]), beta=10.0)
        tensor([2.5000])
    """
    gained = (reference - error).view(-1, 2)
    better = advantages.view(-1, 2)
    return 0.5 * beta * torch.sign(better[:, 0] - better[:, 1]) * (gained[:, 0] - gained[:, 1])


def dpo_loss(margins: Tensor) -> Tensor:
    """``-log sigmoid(margin)``."""
    return softplus(-margins)

"""The clipped GRPO objective on micro-batches of transitions (Euphonium, Eq. 17-19)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import ObjectiveConfig
from dynamics import StepTable
from models.generators.base import Conditioning

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Rows of one micro-batch: one transition of one sample each.

    Attributes:
        states: float32 ``[rows, *latent]``, x_k.
        next_states: float32 like ``states``, x_{k+1}.
        steps: int64 ``[rows]``, k.
        log_probs: float32 ``[rows]`` under the behaviour policy.
        advantages: float32 ``[rows]``.
        gradients: float32 like ``states``, reward gradients that belong to the mean, or None.
        conditioning: of the rows.
        weight: weight of a row in the loss; 0 in micro-batches that only keep the ranks in step.
    """

    states: Tensor
    next_states: Tensor
    steps: Tensor
    log_probs: Tensor
    advantages: Tensor
    gradients: Tensor | None
    conditioning: Conditioning
    weight: float


@dataclass(frozen=True, kw_only=True)
class ObjectiveValue:
    """Loss of a micro-batch and what its rows say about the policy.

    Attributes:
        loss: scalar, the weighted sum over rows.
        ratio: ``[rows]``, importance ratios, detached.
        clipped: bool ``[rows]``, rows whose gradient the clip removes.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """``-min(w A, clip(w, 1 - c, 1 + c) A)`` of every row.

    Returns:
        Losses ``[rows]``, and bool ``[rows]`` where the clipped branch is taken and has no gradient.
    """
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    free, held = ratio * advantages, bounded * advantages
    return -torch.minimum(free, held), (held < free) & (bounded != ratio)


def evaluate_objective(
    config: ObjectiveConfig, table: StepTable, velocity: Velocity, rows: Transitions
) -> ObjectiveValue:
    """Scores transitions under the current policy.

    Args:
        config: kind of objective and clip range.
        table: the sampler that drew the rows.
        velocity: of the current policy, differentiable in its parameters.
        rows: one micro-batch.
    """
    sigmas = table.sigmas[rows.steps].to(device=rows.states.device, dtype=torch.float32)
    v = velocity(rows.states, sigmas, rows.conditioning)
    mean = table.mean(rows.steps, rows.states, v, rows.gradients)
    log_prob = table.log_prob(rows.steps, rows.next_states, mean)
    ratio = torch.exp(log_prob - rows.log_probs)
    losses, clipped = clipped_surrogate(ratio, rows.advantages, config.clip_range)
    return ObjectiveValue(loss=rows.weight * losses.sum(), ratio=ratio.detach(), clipped=clipped)

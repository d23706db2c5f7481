"""The gradients of a source as a recipe wants them: how long they are, and for whom.

The step table multiplies a gradient with ``g_k``; here it is scaled before, once a group and step. Gradients are kept
as they are scaled here, so that the learner needs to know nothing of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actors.members import Members
from actors.sampler import ProcessRewardSource, Rewarded
from euphonium.config import GuidanceConfig
from euphonium.dynamics import StepTable
from euphonium.wire.later import Later


class ScaledGradients:
    """A source with the gradients of another one, scaled; implements :class:`actors.sampler.ProcessRewardSource`.

    Args:
        source: the other source.
        settings: the recipe's guidance.
        table: the sampler.
        strength: multiple of the recipe's guidance.
        members: which samples of the group the gradients are of; None for all.
    """

    def __init__(
        self,
        source: ProcessRewardSource,
        settings: GuidanceConfig,
        table: StepTable,
        strength: float = 1.0,
        members: Members | None = None,
    ) -> None:
        self._source, self._settings, self._table, self._strength = source, settings, table, strength
        self._members = members

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Requests rewards from the other source."""
        answer = self._source.submit(k, x, with_gradient=with_gradient)
        return answer.map(lambda rewarded: self._scaled(k, rewarded)) if with_gradient else answer

    def _scaled(self, k: int, answer: Rewarded) -> Rewarded:
        rewards, gradient = answer
        if gradient is None:
            return answer
        if self._settings.normalise:
            gradient = unit_length(gradient)
        if self._settings.normalise == "noise":
            gradient = gradient * noise_length(self._table, k, gradient[0].numel())
        if self._settings.strengths != (1.0,) or self._strength != 1:
            members = self._members or Members.all(len(gradient))
            strengths = self._strength * members.of(member_strengths(self._settings.strengths, members.group))
            gradient = gradient * per_sample(strengths.to(gradient), gradient)
        return rewards, gradient


def member_strengths(strengths: tuple[float, ...], group: int) -> Tensor:
    """Strengths of a group's members, ``[group]``: the listed ones in turn.

    >>> member_strengths((0.0, 1.0), 5).tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0]
    """
    return torch.tensor([strengths[i % len(strengths)] for i in range(group)])


def unit_length(gradient: Tensor) -> Tensor:
    """Gradients ``[batch, *latent]``, each sample's scaled to length 1."""
    return gradient / per_sample(gradient.flatten(1).norm(dim=1).clamp(min=1e-8), gradient)


def noise_length(table: StepTable, k: int, dimensions: int) -> float:
    """Length of a gradient with which ``scale: 1`` pushes step k as far as its noise does, ``std_k sqrt(d)``.

    A scale of lambda pushes by ``lambda delta_k`` times the gradient. Where a step has no noise there is no push.
    """
    delta = float(table.sigmas[k] - table.sigmas[k + 1])
    return float(table.std[k]) * math.sqrt(dimensions) / delta


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Numbers ``[batch]`` with the dimensions of ``like``, for multiplication."""
    return values.view(-1, *[1] * (like.dim() - 1))

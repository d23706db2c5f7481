"""Guidance without a process reward model: a zeroth-order gradient of the outcome rewards (Euphonium, Eq. 52)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from actors.members import Members
from actors.sampler import Rewarded, Velocity
from euphonium.dynamics import StepTable
from euphonium.wire.later import Later

# Weighted outcome rewards ``[batch]`` of latents ``[batch, *latent]``.
Score = Callable[[Tensor], Later[Tensor]]


class SpsaSource:
    """Estimates the gradient of ``F(x) = r(decode(predicted data of x))``.

    Implements :class:`actors.sampler.ProcessRewardSource`.

    ``g = mean over K of (F(x + c z) - F(x - c z)) / (2 c) z`` with ``z ~ N(0, I)``, for each sample on its own. All 2 K
    perturbed samples of a step are scored in one request. The reward of a state is the mean of these ``F``.
    """

    def __init__(
        self,
        table: StepTable,
        velocity: Velocity,
        score: Score,
        *,
        perturbations: int,
        scale: float,
        seed: int,
        members: Members | None = None,
    ) -> None:
        """Creates a source; nothing is requested.

        Args:
            table: the sampler.
            velocity: the network's output, for batches of any multiple of the number of samples.
            score: requests the outcome rewards of latents.
            perturbations: K, number of perturbations.
            scale: c, size of a perturbation.
            seed: seed of the perturbations.
            members: which samples of the group the states are of; None for all.
        """
        self._table = table
        self._velocity = velocity
        self._score = score
        self._count = perturbations
        self._scale = scale
        self._noise = torch.Generator().manual_seed(seed)
        self._members = members

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Requests the rewards of a state, or of its perturbations if the gradient is needed."""
        if not with_gradient:
            return self._request(k, x).map(lambda rewards: (rewards, None))
        members = self._members or Members.all(len(x))
        z = members.noise((self._count, *x.shape), self._noise, dim=1).to(x.device)
        perturbed = torch.cat([x + self._scale * z, x - self._scale * z]).flatten(0, 1)
        return self._request(k, perturbed).map(lambda rewards: self._estimate(rewards, z))

    def _request(self, k: int, x: Tensor) -> Later[Tensor]:
        if k == self._table.num_steps:
            return self._score(x)
        return self._score(self._table.predicted_data(k, x, self._velocity(x, float(self._table.times[k]))))

    def _estimate(self, rewards: Tensor, z: Tensor) -> Rewarded:
        """Mean and gradient of rewards ``[2 K * group]`` under perturbations ``[K, group, *latent]``."""
        plus, minus = rewards.view(2, self._count, -1).to(z.device)
        slope: Tensor = (plus - minus) / (2 * self._scale)
        shape = (*slope.shape, *[1] * (z.dim() - 2))
        gradient = (slope.view(shape) * z).mean(dim=0)
        return rewards.view(2 * self._count, -1).mean(dim=0), gradient

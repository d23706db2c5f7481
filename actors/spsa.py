"""Zeroth-order gradient of the pixel reward (Euphonium, Eq. 52), as a source of guidance without a PRM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.sampler import Velocity
from euphonium.dynamics import StepTable

# Weighted outcome rewards of latents ``[batch, *latent]``, answered later.
Score = Callable[[Tensor], Callable[[], Tensor]]


class SpsaSource:
    """Estimates the gradient of ``F(x) = r(decode(predicted data of x))``; a
    :class:`actors.sampler.ProcessRewardSource`.

    ``g = mean over K of (F(x + c z) - F(x - c z)) / (2 c) z`` with ``z ~ N(0, I)``, every sample on its own. All 2 K
    perturbed samples of a step are scored in one request. Its rewards are the mean of the ``F`` it has seen.
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
    ) -> None:
        """Args as described in the class.

        Args:
            table: the sampler.
            velocity: for batches of any multiple of the group's size.
            score: outcome rewards of predicted data.
            perturbations: K.
            scale: c.
            seed: of the perturbations.
        """
        self._table = table
        self._velocity = velocity
        self._score = score
        self._count = perturbations
        self._scale = scale
        self._noise = torch.Generator().manual_seed(seed)

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> _Estimate:
        """See :class:`actors.sampler.ProcessRewardSource`."""
        if not with_gradient:
            return _Estimate(self._request(k, x), 0, self._scale, None)
        z = torch.randn((self._count, *x.shape), generator=self._noise).to(x.device)
        perturbed = torch.cat([x + self._scale * z, x - self._scale * z]).flatten(0, 1)
        return _Estimate(self._request(k, perturbed), self._count, self._scale, z)

    def _request(self, k: int, x: Tensor) -> Callable[[], Tensor]:
        if k == self._table.num_steps:
            return self._score(x)
        return self._score(self._table.predicted_data(k, x, self._velocity(x, float(self._table.times[k]))))


class _Estimate:
    """An estimate whose rewards may still be under way; a :class:`actors.sampler.Pending`."""

    def __init__(self, answer: Callable[[], Tensor], count: int, scale: float, z: Tensor | None) -> None:
        self._answer = answer
        self._count = count
        self._scale = scale
        self._z = z
        self._result: tuple[Tensor, Tensor | None] | None = None

    def result(self) -> tuple[Tensor, Tensor | None]:
        """See :class:`actors.sampler.Pending`."""
        if self._result is None:
            self._result = self._combine(self._answer())
        return self._result

    def _combine(self, rewards: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._z is None:
            return rewards, None
        plus, minus = rewards.view(2, self._count, -1).to(self._z.device)
        slope: Any = (plus - minus) / (2 * self._scale)
        shape = (*slope.shape, *[1] * (self._z.dim() - 2))
        gradient = (slope.view(shape) * self._z).mean(dim=0)
        return rewards.view(2 * self._count, -1).mean(dim=0), gradient

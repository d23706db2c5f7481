"""PRM servers: rewards of noisy states and their gradients, for rollout actors in the middle of a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.arrays import as_tensor
from core.config import RunConfig
from core.errors import RewardError
from core.records import Array
from models.generators.base import expand
from models.rewards.prm import ProcessRewardModel


class PrmScorer:
    """The plain class behind a PRM server."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        if config.rewards.process is None:
            raise ValueError("a PRM server needs rewards.process")
        self.device = device
        self.model = ProcessRewardModel.load(Path(config.rewards.process.path), config.model).to(device)

    def reward_and_gradient(
        self, x: Array, sigma: float, conditioning: dict[str, Array], with_gradient: bool
    ) -> tuple[Array, Array | None]:
        """Scores states of one group.

        Args:
            x: float32 ``[group, *latent]``.
            sigma: noise fraction.
            conditioning: of the prompt, with a leading dimension of 1.
            with_gradient: whether the gradient is wanted too.

        Returns:
            Rewards ``[group]`` and gradient like ``x`` or None, float32.

        Raises:
            RewardError: a reward or gradient that is not finite.
        """
        states = as_tensor(x).to(self.device)
        sigmas = torch.full((len(x),), sigma, dtype=torch.float32, device=self.device)
        prompt = expand(
            {name: as_tensor(a).to(self.device, self.model.family.dtype) for name, a in conditioning.items()}, len(x)
        )
        gradient = None
        if with_gradient:
            rewards, gradient = self.model.reward_and_gradient(states, sigmas, prompt)
        else:
            with torch.no_grad():
                rewards = self.model(states, sigmas, prompt)
        for name, tensor in (("reward", rewards), ("gradient", gradient)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise RewardError(f"the process reward model gave a {name} that is not finite at sigma {sigma:.3f}")
        return (
            rewards.float().cpu().numpy(),
            None if gradient is None else gradient.float().cpu().numpy(),
        )


class PrmActor:
    """A :class:`PrmScorer` as a Ray actor."""

    def __init__(self, index: int, config: RunConfig) -> None:
        torch.set_num_threads(config.pools.prm.threads)
        self.index = index
        self.scorer = PrmScorer(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.busy_s = 0.0

    def __repr__(self) -> str:
        return f"prm-{self.index}"

    def ready(self) -> dict[str, Any]:
        """Answers once the model is loaded; also the seconds that have been spent scoring."""
        return {"device": str(self.scorer.device), "busy_s": self.busy_s}

    def reward_and_gradient(
        self, x: Array, sigma: float, conditioning: dict[str, Array], with_gradient: bool
    ) -> tuple[Array, Array | None]:
        """See :meth:`PrmScorer.reward_and_gradient`."""
        began = time.perf_counter()
        rewards, gradient = self.scorer.reward_and_gradient(np.asarray(x), sigma, conditioning, with_gradient)
        self.busy_s += time.perf_counter() - began
        return rewards, gradient

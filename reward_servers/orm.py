"""ORM servers: take latents, decode them, score the videos; the generator never holds VAE or reward models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from core.arrays import as_tensor
from core.config import OutcomeRewardConfig, RunConfig
from core.errors import RewardError
from core.records import Array
from models.generators.base import GeneratorFamily, open_generator
from models.rewards.registry import build_reward

DECODE_BATCH = 16


class OrmScorer:
    """The plain class behind an ORM server."""

    def __init__(self, rewards: Sequence[OutcomeRewardConfig], family: GeneratorFamily, device: torch.device) -> None:
        self.decode = family.load_decoder(device)
        self.rewards = {spec.name: build_reward(spec) for spec in rewards}

    def videos(self, latents: Array) -> Array:
        """Decodes latents ``[batch, *latent]`` to uint8 ``[batch, frames, height, width, 3]``."""
        parts = [self.decode(part) for part in as_tensor(latents).split(DECODE_BATCH)]
        pixels = torch.cat(parts).permute(0, 1, 3, 4, 2).mul(255).round().to(torch.uint8)
        return np.asarray(pixels.cpu().numpy())

    def score(self, latents: Array, prompts: Sequence[str]) -> dict[str, Array]:
        """Scores finished samples.

        Args:
            latents: float32 ``[batch, *latent]``.
            prompts: one a sample.

        Returns:
            For every reward, float32 ``[batch]``.

        Raises:
            RewardError: a reward failed or gave something that is not finite; names reward and prompt.
        """
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.rewards}
        for begin in range(0, len(latents), DECODE_BATCH):
            part = slice(begin, begin + DECODE_BATCH)
            videos = self.decode(as_tensor(latents[part]))
            for name, reward in self.rewards.items():
                try:
                    scores = reward.score(videos, prompts[part]).float().cpu()
                except Exception as error:
                    raise RewardError(f"outcome reward {name!r} failed: {type(error).__name__}: {error}") from error
                bad = ~torch.isfinite(scores)
                if scores.shape != (len(videos),) or bool(bad.any()):
                    culprit = prompts[part][int(bad.nonzero()[0])] if bool(bad.any()) else prompts[part][0]
                    raise RewardError(
                        f"outcome reward {name!r} gave {scores.tolist()} for {len(videos)} videos, "
                        f"for example of {culprit!r}: not one finite number a video"
                    )
                parts[name].append(scores)
        return {name: torch.cat(scores).numpy() for name, scores in parts.items()}


class OrmActor:
    """An :class:`OrmScorer` as a Ray actor."""

    def __init__(self, index: int, config: RunConfig) -> None:
        torch.set_num_threads(config.pools.orm.threads)
        self.index = index
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scorer = OrmScorer(config.rewards.outcome, open_generator(config.model), self.device)

    def __repr__(self) -> str:
        return f"orm-{self.index}"

    def ready(self) -> dict[str, Any]:
        """Answers once decoder and rewards are loaded."""
        return {"device": str(self.device)}

    def score(self, latents: Array, prompts: Sequence[str]) -> tuple[dict[str, Array], float]:
        """See :meth:`OrmScorer.score`; also the seconds that it took."""
        began = time.perf_counter()
        return self.scorer.score(latents, prompts), time.perf_counter() - began

    def videos(self, latents: Array) -> Array:
        """See :meth:`OrmScorer.videos`."""
        return self.scorer.videos(latents)

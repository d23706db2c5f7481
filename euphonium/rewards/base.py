"""The interface of outcome rewards: videos and their prompts in, one score a video out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class OutcomeReward(Protocol):
    """A reward of finished samples.

    Implementations are deterministic, hold their own networks, and raise on input that they cannot score: a failure
    never becomes a number.
    """

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores a batch of videos.

        Args:
            videos: float32 ``[batch, frames, 3, height, width]`` in [0, 1]; images have one frame. The tensor is this
                reward's own.
            prompts: one text a video.

        Returns:
            float32 ``[batch]``; higher is better.
        """
        ...

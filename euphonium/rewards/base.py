"""What every outcome reward is: decoded videos and their prompts in, one bounded score a video out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class OutcomeReward(Protocol):
    """A reward of finished samples.

    Implementations are deterministic, hold their own networks, and raise on input that they cannot score; they never
    answer a failure with a number.
    """

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores a batch.

        Args:
            videos: float32 ``[batch, frames, 3, height, width]`` in [0, 1]; images have one frame.
            prompts: one text a video.

        Returns:
            float32 ``[batch]``; higher is better.
        """
        ...

"""The interface of outcome rewards: videos and their prompts in, one score a video out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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


class MetadataReward(Protocol):
    """A reward that reads more of a prompt file's lines than texts: its ``score`` has a parameter ``metadata``."""

    def score(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores a batch of videos, as :meth:`OutcomeReward.score` does.

        Args:
            videos: as there.
            prompts: as there.
            metadata: of each video's prompt, what its line says besides ``prompt`` and ``image``; empty for lines that
                say nothing.
        """
        ...

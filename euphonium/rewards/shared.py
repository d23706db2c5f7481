"""Rewards that read one analysis of the videos: a network with several outputs looks at a batch once for all of them.

An :class:`Analyser` holds what is shared, a :class:`SharedReward` reads its score off the analysis, and a
:class:`Batch` lets each analyser look at the videos once. Which rewards of a recipe get the same analyser is decided in
:mod:`euphonium.rewards.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from euphonium.config import Node
from euphonium.rewards.base import OutcomeReward

Analysis = TypeVar("Analysis")
Analysis_co = TypeVar("Analysis_co", covariant=True)


class Analyser(ABC, Generic[Analysis_co]):
    """What looks at the videos: constructed with its :attr:`Options`, and deterministic.

    Attributes:
        Options: what distinguishes one analyser of this class from another; hashable.
    """

    Options: ClassVar[type[Node]] = Node

    def __init__(self, options: Node) -> None:
        del options

    @abstractmethod
    def analyse(self, videos: Tensor, prompts: Sequence[str]) -> Analysis_co:
        """Everything that rewards may want to read about a batch.

        Args:
            videos: float32 ``[batch, frames, 3, height, width]`` in [0, 1].
            prompts: one text a video.

        Raises:
            ValueError: videos or prompts that cannot be analysed.
        """


class SharedReward(ABC, Generic[Analysis]):
    """A reward that is read off an analysis.

    Attributes:
        analyser_class: what makes the analysis.
        Options: fields of the analyser's options, and the reward's own.
        analyser: of this reward, perhaps also of others.
    """

    analyser_class: ClassVar[type[Analyser[object]]]
    Options: ClassVar[type[Node]] = Node

    def __init__(self, options: Node, analyser: Analyser[Analysis]) -> None:
        del options
        self.analyser = analyser

    @abstractmethod
    def read(self, analysis: Analysis, prompts: Sequence[str]) -> Tensor:
        """Scores, float32 ``[batch]``, of the videos that were analysed together with ``prompts``."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores a batch that nobody else reads; see :class:`euphonium.rewards.base.OutcomeReward`."""
        return self.read(self.analyser.analyse(videos, prompts), prompts)


class Batch:
    """Videos that several rewards score one after another; each analyser looks at them once."""

    def __init__(self, videos: Tensor, prompts: Sequence[str]) -> None:
        self._videos = videos
        self._prompts = prompts
        self._analyses: dict[Analyser[object], object] = {}

    def score(self, reward: OutcomeReward) -> Tensor:
        """Scores, float32 ``[batch]``, by one reward; raises what the reward raises."""
        if not isinstance(reward, SharedReward):
            return reward.score(self._videos, self._prompts)
        if reward.analyser not in self._analyses:
            self._analyses[reward.analyser] = reward.analyser.analyse(self._videos, self._prompts)
        scores: Tensor = reward.read(self._analyses[reward.analyser], self._prompts)
        return scores

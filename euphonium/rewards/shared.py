"""Rewards that share one analysis of the videos, so that a network with several outputs runs once a batch.

An :class:`Analyser` makes the analysis, a :class:`SharedReward` reads its score off it, and a :class:`Batch` runs each
analyser once. Which rewards of a recipe share an analyser is decided in :mod:`euphonium.rewards.registry`.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor

from euphonium.config import Node
from euphonium.prompt_files import metadata_of
from euphonium.rewards.base import MetadataReward, OutcomeReward

Analysis = TypeVar("Analysis")
Analysis_co = TypeVar("Analysis_co", covariant=True)


class Analyser(ABC, Generic[Analysis_co]):
    """Analyses videos for several rewards; constructed with its :attr:`Options`, and deterministic.

    Attributes:
        Options: hashable options; analysers of one class with equal options are interchangeable.
    """

    Options: ClassVar[type[Node]] = Node

    def __init__(self, options: Node) -> None:
        del options

    @abstractmethod
    def analyse(self, videos: Tensor, prompts: Sequence[str]) -> Analysis_co:
        """The analysis of a batch, from which rewards read their scores.

        Args:
            videos: float32 ``[batch, frames, 3, height, width]`` in [0, 1].
            prompts: one text a video.

        Raises:
            ValueError: the videos or prompts cannot be analysed.
        """


class SharedReward(ABC, Generic[Analysis]):
    """A reward that is read off an analysis.

    Attributes:
        analyser_class: class of the analyser.
        Options: options of the reward, which include the fields of the analyser's.
        analyser: the analyser, possibly shared with other rewards.
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
        """Scores videos, float32 ``[batch]``, with an analysis of their own; :class:`Batch` shares one."""
        return self.read(self.analyser.analyse(videos, prompts), prompts)


class Batch:
    """Videos that several rewards score one after another; each analyser runs on them once.

    No reward sees what another one did: each gets videos, prompts and analyses of its own, to write into as it likes,
    and computes without gradients. A copy of the videos is small beside what decoding them took, and is freed before
    the next one; writes could not be found out more cheaply, since numpy's leave no mark on a tensor.
    """

    def __init__(self, videos: Tensor, prompts: Sequence[str]) -> None:
        self._videos = videos
        self._prompts = [str(prompt) for prompt in prompts]
        self._metadata = [metadata_of(prompt) for prompt in prompts]
        self._analyses: dict[Analyser[object], object] = {}

    def score(self, reward: OutcomeReward) -> Tensor:
        """Scores of one reward, as it gave them, without a graph.

        Raises:
            TypeError: they are no tensor.
            Exception: whatever the reward raises.
        """
        with torch.no_grad():
            scores = self._scored(reward)
        if not isinstance(scores, Tensor):
            raise TypeError(f"score returned {type(scores).__name__}, not a tensor of one number a video")
        return scores.detach()

    def _scored(self, reward: OutcomeReward) -> object:
        prompts = list(self._prompts)
        if not isinstance(reward, SharedReward):
            if _asks_for_metadata(reward):
                asking = cast("MetadataReward", reward)
                return asking.score(self._videos.clone(), prompts, copy.deepcopy(self._metadata))
            return reward.score(self._videos.clone(), prompts)
        if reward.analyser not in self._analyses:
            self._analyses[reward.analyser] = reward.analyser.analyse(self._videos.clone(), prompts)
        return reward.read(copy.deepcopy(self._analyses[reward.analyser]), list(self._prompts))


def _asks_for_metadata(reward: OutcomeReward) -> bool:
    """Whether it is a :class:`euphonium.rewards.base.MetadataReward`; compiled functions do not say."""
    try:
        return "metadata" in inspect.signature(reward.score).parameters
    except ValueError:
        return False

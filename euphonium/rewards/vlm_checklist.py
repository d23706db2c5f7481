"""A vision-language model that goes through a checklist of yes-or-no questions, as VisionReward does.

The score of a video is the mean over the questions of ``w_i a_i``, with ``a_i`` 1 for yes and -1 for no, and weights
``w_i`` that somebody has fitted to people's preferences. VisionReward publishes both files beside its model, which
a server of the OpenAI protocol has to serve.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from euphonium.config.base import UserPath
from euphonium.errors import ConfigError
from euphonium.rewards.chat import PLACE, Chat, ChatOptions, Question
from euphonium.rewards.frames import check_videos
from euphonium.text_files import read_lines, read_text, shown

# How VisionReward's questions write the place of the prompt.
OTHER_PLACE = "[[prompt]]"
ANSWERS = {"yes": 1.0, "no": -1.0}


class VlmChecklist:
    """Weighs a vision-language model's answers to questions about each video."""

    class Options(ChatOptions):
        """The model, and its checklist."""

        questions: UserPath
        """Text file with a question a line; ``{prompt}`` or ``[[prompt]]`` stands for the video's prompt."""
        weights: UserPath | None = None
        """JSON file with a list of numbers, one a question; null gives all questions a weight of 1."""

    def __init__(self, options: Options) -> None:
        """Reads questions and weights; no request is made before the first batch.

        Raises:
            ConfigError: a file cannot be read, there are no questions, or not a finite weight for each of them; not an
                http(s) address, or the variable is not set.
        """
        lines = read_lines(options.questions, "option questions", [".txt"])
        self._questions = [line.strip().replace(OTHER_PLACE, PLACE) for line in lines if line.strip()]
        if not self._questions:
            raise ConfigError(f"option questions: {options.questions} has no question; write one a line")
        self._weights = torch.ones(len(self._questions))
        if options.weights is not None:
            self._weights = _weights(options.weights, len(self._questions))
        self._chat = Chat(options, "every question of the checklist has to be answered with yes or no")

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``: at most the mean of the weights' sizes, at least its negative.

        Raises:
            RewardError: no answer in time, an error status, or an answer that begins with neither yes nor no.
        """
        check_videos(videos, prompts)
        asked = []
        for video, prompt in zip(videos, prompts, strict=True):
            pictures = self._chat.pictures(video)
            asked += [Question(question.replace(PLACE, str(prompt)), pictures) for question in self._questions]
        answers = torch.tensor(self._chat.answers(asked, _yes_or_no), dtype=torch.float32)
        return (answers.view(len(videos), -1) * self._weights).mean(dim=1)


def _yes_or_no(text: str) -> float:
    """1 or -1.

    >>> _yes_or_no(" Yes, it does."), _yes_or_no("no")
    (1.0, -1.0)
    """
    word = re.match(r"[\s\"'*]*(\w+)", text)
    if word is None or (value := ANSWERS.get(word[1].lower())) is None:
        raise ValueError(f"{shown(text)} begins with neither yes nor no")
    return value


def _weights(path: UserPath, count: int) -> Tensor:
    try:
        found = json.loads(read_text(path, "option weights"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"option weights: {path} is no JSON: {error}; write a list of numbers") from error
    numbers = isinstance(found, list) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) for w in found
    )
    if not numbers or len(found) != count:
        held = f"{len(found)} numbers" if numbers else shown(found)
        raise ConfigError(f"option weights: {path} holds {held}; write a list of {count}, one for each question")
    return torch.tensor(found, dtype=torch.float32)

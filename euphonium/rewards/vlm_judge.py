"""A vision-language model as a judge, which scores each video by one number.

The answer is a JSON object with that number. What is no such object, or a number out of the scale, is an error of this
reward and never a score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from euphonium.rewards.chat import PLACE, Chat, ChatOptions, Question
from euphonium.rewards.frames import check_videos
from euphonium.text_files import shown

FENCE = "```"


class VlmJudge:
    """Asks a vision-language model for a score of each video."""

    class Options(ChatOptions):
        """The model, and what it is asked."""

        question: str
        """What it is asked, before the pictures; ``{prompt}`` stands for the video's prompt."""
        low: float = 0.0
        """Least score that an answer may give."""
        high: float = 10.0
        """Largest score that an answer may give."""
        key: str = "score"
        """Name of the number in the answer."""
        structured: Literal["json_schema", "json_object", "none"] = "json_schema"
        """How the server is told to answer in JSON: by a schema, as an object, or by the question alone."""

        @model_validator(mode="after")
        def _asks_on_a_scale(self) -> Self:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low:g}) is not below high ({self.high:g})")
            if PLACE not in self.question:
                raise ValueError(
                    f"question has no {PLACE}, so that the model would not know what the video should show"
                )
            return self

    def __init__(self, options: Options) -> None:
        """Checks the address; no request is made before the first batch.

        Raises:
            ConfigError: not an http(s) address, or the variable is not set.
        """
        self.options = options
        example = json.dumps({options.key: options.high})
        self._chat = Chat(options, f"the judge has to answer a JSON object such as {example}", _answer_format(options))

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``, between ``low`` and ``high``.

        Raises:
            RewardError: no answer in time, an error status, or an answer that is no score.
        """
        check_videos(videos, prompts)
        questions = [
            Question(self.options.question.replace(PLACE, str(prompt)), self._chat.pictures(video))
            for video, prompt in zip(videos, prompts, strict=True)
        ]
        return torch.tensor(self._chat.answers(questions, self._read), dtype=torch.float32)

    def _read(self, text: str) -> float:
        found = json.loads(_unfenced(text))
        value = found.get(self.options.key) if isinstance(found, dict) else None
        # A bool is an int, and no score.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"no number {self.options.key!r} in {shown(text)}")
        if not self.options.low <= value <= self.options.high:
            raise ValueError(f"{value:g} is not from {self.options.low:g} to {self.options.high:g}")
        return float(value)


def _answer_format(options: VlmJudge.Options) -> dict[str, Any] | None:
    if options.structured == "none":
        return None
    if options.structured == "json_object":
        return {"type": "json_object"}
    number = {"type": "number", "minimum": options.low, "maximum": options.high}
    schema = {
        "type": "object", "properties": {options.key: number}, "required": [options.key], "additionalProperties": False,
    }  # fmt: skip
    return {"type": "json_schema", "json_schema": {"name": "judgement", "strict": True, "schema": schema}}


def _unfenced(text: str) -> str:
    """An answer without the code fence that some models put around it."""
    stripped = text.strip()
    if stripped.startswith(FENCE) and stripped.endswith(FENCE) and "\n" in stripped:
        return stripped.removesuffix(FENCE).partition("\n")[2]
    return stripped

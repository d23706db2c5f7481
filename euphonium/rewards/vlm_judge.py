"""A vision-language model behind an OpenAI-compatible address as a judge: vLLM, SGLang, or a hosted one.

A video is sent as a few pictures with a question, and the answer is a JSON object with a number. What is no such
object, or a number out of the scale, is an error of this reward and never a score.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

import torch
from PIL import Image
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from euphonium.config import Node
from euphonium.config.base import NonNegativeFloat, NonNegativeInt
from euphonium.errors import RewardError
from euphonium.rewards.frames import as_bytes, check_videos, spread
from euphonium.rewards.posting import Poster
from euphonium.text_files import shown

JSON = "application/json"
PLACE = "{prompt}"
FENCE = "```"


class VlmJudge:
    """Asks a vision-language model for a score of each video."""

    class Options(Node):
        """The model, and what it is asked."""

        url: str
        """Base address of the API, such as ``http://judge:8000/v1``; ``/chat/completions`` is added."""
        model: str
        """Name of the model, as the server calls it."""
        question: str
        """What it is asked, before the pictures; ``{prompt}`` stands for the video's prompt."""
        low: float = 0.0
        """Least score that an answer may give."""
        high: float = 10.0
        """Largest score that an answer may give."""
        key: str = "score"
        """Name of the number in the answer."""
        frames: PositiveInt = 4
        """Pictures of a video that are sent, evenly spread."""
        structured: Literal["json_schema", "json_object", "none"] = "json_schema"
        """How the server is told to answer in JSON: by a schema, as an object, or by the question alone."""
        temperature: NonNegativeFloat = 0.0
        """Of the answer; above 0 the same video gets other scores."""
        seed: NonNegativeInt | None = 0
        """Sent with each request, for servers that repeat an answer by it; null sends none."""
        max_tokens: PositiveInt = 512
        """Longest answer; one that is cut is an error."""
        parallel: PositiveInt = 8
        """Requests at a time."""
        timeout_s: PositiveFloat = 60.0
        """Longest time that one request may take."""
        token_env: str | None = None
        """Environment variable with an API key, so that no recipe holds one."""

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
        url = f"{options.url.rstrip('/')}/chat/completions"
        self._poster = Poster(url, options.timeout_s, options.token_env, {"Content-Type": JSON, "Accept": JSON})

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``, between ``low`` and ``high``.

        Raises:
            RewardError: no answer in time, an error status, or an answer that is no score.
        """
        check_videos(videos, prompts)
        bodies = [self._request(video, str(prompt)) for video, prompt in zip(videos, prompts, strict=True)]
        with ThreadPoolExecutor(min(self.options.parallel, len(bodies))) as threads:
            return torch.tensor(list(threads.map(self._asked, bodies)), dtype=torch.float32)

    def _request(self, video: Tensor, prompt: str) -> bytes:
        options = self.options
        pictures = as_bytes(video[spread(len(video), options.frames)])
        text = options.question.replace(PLACE, prompt)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        content += [{"type": "image_url", "image_url": {"url": _data_url(Image.fromarray(p))}} for p in pictures]
        body: dict[str, Any] = {
            "model": options.model, "messages": [{"role": "user", "content": content}],
            "temperature": options.temperature, "max_tokens": options.max_tokens,
        }  # fmt: skip
        if options.seed is not None:
            body["seed"] = options.seed
        if options.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif options.structured == "json_schema":
            number = {"type": "number", "minimum": options.low, "maximum": options.high}
            schema = {
                "type": "object", "properties": {options.key: number}, "required": [options.key],
                "additionalProperties": False,
            }  # fmt: skip
            described = {"name": "judgement", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        return json.dumps(body).encode()

    def _asked(self, body: bytes) -> float:
        content_type, answer = self._poster.post(body)
        try:
            if content_type != JSON:
                raise ValueError(f"content type {content_type!r}")
            return self._read(json.loads(answer))
        except Exception as error:  # whatever a foreign server sends must end as an error of this reward
            raise RewardError(
                f"{self._poster.url} gave no score: {shown(error)}; the judge has to answer a JSON object such as "
                f'{{"{self.options.key}": {self.options.high:g}}}, see docs/rewards.md'
            ) from error

    def _read(self, answer: Any) -> float:
        (choice,) = answer["choices"]
        message = choice["message"]
        if message.get("refusal"):
            raise ValueError(f"the model refuses: {message['refusal']}")
        if choice.get("finish_reason") != "stop":
            raise ValueError(f"the answer ended by {choice.get('finish_reason')!r}, not by itself; raise max_tokens")
        found = json.loads(_unfenced(message["content"]))
        value = found.get(self.options.key) if isinstance(found, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"no number {self.options.key!r} in {shown(message['content'])}")
        if not self.options.low <= value <= self.options.high:
            raise ValueError(f"{value:g} is not from {self.options.low:g} to {self.options.high:g}")
        return float(value)


def _unfenced(text: str) -> str:
    """An answer without the code fence that some models put around it."""
    stripped = text.strip()
    if stripped.startswith(FENCE) and stripped.endswith(FENCE) and "\n" in stripped:
        return stripped.removesuffix(FENCE).partition("\n")[2]
    return stripped


def _data_url(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"

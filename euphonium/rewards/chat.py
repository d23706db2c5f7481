"""Questions about videos to a vision-language model behind an OpenAI-compatible address: vLLM, SGLang, or a hosted one.

A video is sent as a few pictures with a question. Whatever goes wrong on the way is a :class:`RewardError`; what an
answer means is for the reward that asked.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from euphonium.config import Node
from euphonium.config.base import NonNegativeFloat, NonNegativeInt
from euphonium.errors import RewardError
from euphonium.rewards.frames import as_bytes, spread
from euphonium.rewards.posting import Poster
from euphonium.text_files import shown

JSON = "application/json"
PLACE = "{prompt}"

_T = TypeVar("_T")


class ChatOptions(Node):
    """The model, and how it is asked."""

    url: str
    """Base address of the API, such as ``http://judge:8000/v1``; ``/chat/completions`` is added."""
    model: str
    """Name of the model, as the server calls it."""
    frames: PositiveInt = 4
    """Pictures of a video that are sent, evenly spread."""
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


@dataclass(frozen=True)
class Question:
    """A question about a video.

    Attributes:
        text: what is asked.
        pictures: the video's, as parts of a message.
    """

    text: str
    pictures: Sequence[dict[str, Any]]


class Chat:
    """Asks the model that the options name.

    Args:
        options: the options.
        wanted: what an answer has to be, for errors.
        response_format: field of the API that tells the server how to answer, or None.

    Raises:
        ConfigError: not an http(s) address, or the variable of the key is not set.
    """

    def __init__(self, options: ChatOptions, wanted: str, response_format: dict[str, Any] | None = None) -> None:
        self._options, self._wanted, self._format = options, wanted, response_format
        url = f"{options.url.rstrip('/')}/chat/completions"
        self._poster = Poster(url, options.timeout_s, options.token_env, {"Content-Type": JSON, "Accept": JSON})

    def pictures(self, video: Tensor) -> list[dict[str, Any]]:
        """A video ``[frames, 3, height, width]`` as parts of a message, to be asked about as often as wanted."""
        frames = as_bytes(video[spread(len(video), self._options.frames)])
        return [{"type": "image_url", "image_url": {"url": _data_url(Image.fromarray(frame))}} for frame in frames]

    def answers(self, questions: Sequence[Question], read: Callable[[str], _T]) -> list[_T]:
        """What the model answers, ``parallel`` questions at a time.

        Args:
            questions: the questions.
            read: makes a value of an answer's text; raises on one that is none.

        Raises:
            RewardError: no answer in time, an error status, or an answer that is not what is wanted.
        """
        with ThreadPoolExecutor(min(self._options.parallel, len(questions))) as threads:
            return list(threads.map(lambda question: self._answer(question, read), questions))

    def _answer(self, question: Question, read: Callable[[str], _T]) -> _T:
        content_type, answer = self._poster.post(self._body(question))
        try:
            if content_type != JSON:
                raise ValueError(f"content type {content_type!r}")
            return read(_text(json.loads(answer)))
        except Exception as error:  # whatever a foreign server sends must end as an error of this reward
            raise RewardError(
                f"{self._poster.url} gave no score: {shown(error)}; {self._wanted}, see docs/rewards.md"
            ) from error

    def _body(self, question: Question) -> bytes:
        options = self._options
        body: dict[str, Any] = {
            "model": options.model,
            "messages": [{"role": "user", "content": [{"type": "text", "text": question.text}, *question.pictures]}],
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }
        if options.seed is not None:
            body["seed"] = options.seed
        if self._format is not None:
            body["response_format"] = self._format
        return json.dumps(body).encode()


def _text(answer: Any) -> str:
    """The text of the one choice of an answer that ended by itself."""
    (choice,) = answer["choices"]
    message = choice["message"]
    if message.get("refusal"):
        raise ValueError(f"the model refuses: {message['refusal']}")
    if choice.get("finish_reason") != "stop":
        raise ValueError(f"the answer ended by {choice.get('finish_reason')!r}, not by itself; raise max_tokens")
    text: str = message["content"]
    return text


def _data_url(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"

"""A reward that another process serves over HTTP: tensors travel as safetensors, never as pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from safetensors.torch import load, save
from torch import Tensor

from euphonium.config import Node
from euphonium.errors import RewardError
from euphonium.rewards.frames import check_videos, quantised
from euphonium.rewards.posting import Poster
from euphonium.text_files import shown

SAFETENSORS = "application/octet-stream"


class HttpReward:
    """Posts videos and prompts to a scorer, and reads one finite number a video from its answer.

    The request is one safetensors file: the tensor ``videos``, uint8 ``[batch, frames, 3, height, width]`` (or float32
    in [0, 1]), and the metadata entry ``prompts``, a JSON list; with the option ``metadata`` also one of that name, a
    JSON list of objects. The answer is JSON, ``{"scores": [...]}``, or a safetensors file with a floating-point
    tensor ``scores``, told apart by its Content-Type (``application/json`` or ``application/octet-stream``).
    """

    class Options(Node):
        """The scorer, and what is sent to it."""

        url: str
        """Where to post: an ``http://`` or ``https://`` address."""
        timeout_s: PositiveFloat = 30.0
        """Longest time that one batch may take, from the connection to the last byte."""
        dtype: Literal["uint8", "float32"] = "uint8"
        """Type of the videos in the request: levels, or values in [0, 1] as they are."""
        key: str = "scores"
        """Name of the scores in the answer."""
        metadata: bool = False
        """Send what the prompts' file says of each besides text and image, too."""
        token_env: str | None = None
        """Environment variable with a bearer token, so that no recipe holds one."""

    def __init__(self, options: Options) -> None:
        """Checks the address; no request is made before the first batch.

        Raises:
            ConfigError: not an http(s) address, or the variable is not set.
        """
        headers = {"Content-Type": SAFETENSORS, "Accept": f"application/json, {SAFETENSORS}"}
        self._poster = Poster(options.url, options.timeout_s, options.token_env, headers)
        self.url = options.url
        self.dtype = options.dtype
        self.key = options.key
        self.metadata = options.metadata

    def _scores(self, content_type: str, body: bytes) -> Tensor:
        """Reads the scores in an answer, float32, of any shape."""
        found: Tensor | list[float] | None
        if content_type == SAFETENSORS:
            tensor = load(body).get(self.key)
            if tensor is not None and not tensor.is_floating_point():
                raise ValueError(f"{self.key!r} is {tensor.dtype}, not floating point")
            found = tensor
        elif content_type == "application/json":
            answer = json.loads(body)
            found = answer.get(self.key) if isinstance(answer, dict) else None
            if found is not None and not (
                isinstance(found, list) and all(type(value) in (int, float) for value in found)
            ):
                raise ValueError(f"{self.key!r} is no list of numbers")
        else:
            raise ValueError(f"content type {content_type!r}")
        if found is None:
            raise ValueError(f"no {self.key!r} in it")
        return torch.as_tensor(found, dtype=torch.float32)

    def score(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Scores videos, float32 ``[batch]``, in the server's range.

        Raises:
            RewardError: no answer in time, an error status, or an answer without one finite number a video.
        """
        check_videos(videos, prompts)
        sent = quantised(videos).to(torch.uint8) if self.dtype == "uint8" else videos.float()
        described = {"prompts": json.dumps(list(prompts))}
        if self.metadata:
            described["metadata"] = json.dumps([dict(entries) for entries in metadata] or [{}] * len(prompts))
        body = save({"videos": sent.cpu().contiguous()}, metadata=described)
        content_type, answer = self._poster.post(body)
        try:
            scores = self._scores(content_type, answer)
        except Exception as error:  # whatever a foreign server sends must end as an error of this reward
            raise RewardError(
                f"{self.url} answered something unreadable: {shown(error)}; docs/rewards.md says what it should answer"
            ) from error
        if scores.shape != (len(videos),) or not bool(torch.isfinite(scores).all()):
            raise RewardError(
                f"{self.url} answered {scores.tolist()!r:.300} for {len(videos)} videos: not one finite number a "
                "video; see docs/rewards.md"
            )
        return scores

"""A reward that another process serves over HTTP: tensors travel as safetensors, never as pickles."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from pydantic import PositiveFloat
from safetensors.torch import load, save
from torch import Tensor

from euphonium.config import Node
from euphonium.errors import ConfigError, RewardError
from euphonium.rewards.frames import check_videos, quantised
from euphonium.text_files import quoted, shown

SAFETENSORS = "application/octet-stream"
# Far more than scores need; a server that sends more is not a scorer.
MAX_ANSWER_BYTES = 1 << 22
CHUNK = 1 << 16
# ValueError and OverflowError: the length of a chunk that is no number, or none that fits.
BROKEN_ANSWERS = (URLError, HTTPException, OSError, ValueError, OverflowError)


class _NoRedirect(HTTPRedirectHandler):
    """Refuses redirects, which would turn the POST into a GET and send the token to another host."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Returns None, so that the redirect's status becomes an error."""
        return


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Reading the port checks it.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _said(error: HTTPError) -> str:
    """The beginning of what a server says about its error, as far as it comes."""
    try:
        said = error.read(300)
    except BROKEN_ANSWERS:
        return ""
    return f": {shown(said.decode('utf-8', 'replace'), 300)}" if said else ""


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
        token_env = options.token_env
        if not _is_address(options.url):
            raise ConfigError(f"option url: {quoted(options.url)} is no http:// or https:// address; give one")
        self.url = options.url
        self.timeout_s = options.timeout_s
        self.dtype = options.dtype
        self.key = options.key
        self.metadata = options.metadata
        self._headers = {"Content-Type": SAFETENSORS, "Accept": f"application/json, {SAFETENSORS}"}
        if token_env is not None:
            token = os.environ.get(token_env)
            if not token:
                raise ConfigError(f"option token_env: the environment variable {token_env!r} is not set")
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = build_opener(_NoRedirect())

    def _post(self, body: bytes) -> tuple[str, bytes]:
        """Posts a request; returns content type and bytes of the answer."""
        deadline = time.monotonic() + self.timeout_s
        request = Request(self.url, data=body, headers=self._headers, method="POST")
        held = bytearray()
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                # The socket's timeout starts anew with every packet; the deadline bounds them all.
                while chunk := answer.read1(CHUNK):
                    held += chunk
                    if len(held) > MAX_ANSWER_BYTES:
                        raise RewardError(f"{self.url} answered more than {MAX_ANSWER_BYTES} bytes; scores are a few")
                    if time.monotonic() > deadline:
                        raise TimeoutError
                return answer.headers.get_content_type(), bytes(held)
        except HTTPError as error:
            raise RewardError(f"{self.url} answered HTTP {error.code}{_said(error)}; see to the server") from error
        except TimeoutError as error:
            raise RewardError(
                f"{self.url} did not answer within {self.timeout_s} s; see to the server, or raise timeout_s"
            ) from error
        except BROKEN_ANSWERS as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise RewardError(
                    f"{self.url} did not answer within {self.timeout_s} s; see to the server, or raise timeout_s"
                ) from error
            raise RewardError(f"cannot reach {self.url}: {shown(error)}; see to the server, or correct url") from error

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
        content_type, answer = self._post(body)
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

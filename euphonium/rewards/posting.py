"""Posts of rewards that another process serves: an address, a token, one deadline for the whole answer."""

from __future__ import annotations

import os
import time
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from euphonium.errors import ConfigError, RewardError
from euphonium.text_files import quoted, shown

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


class Poster:
    """Posts bodies of one content type to one address.

    Args:
        url: where to.
        timeout_s: longest time of a post, from the connection to the last byte.
        token_env: environment variable with a bearer token, or None.
        headers: of every request.

    Raises:
        ConfigError: not an http(s) address, or the variable is not set.
    """

    def __init__(self, url: str, timeout_s: float, token_env: str | None, headers: dict[str, str]) -> None:
        if not _is_address(url):
            raise ConfigError(f"option url: {quoted(url)} is no http:// or https:// address; give one")
        self.url, self.timeout_s = url, timeout_s
        self._headers = dict(headers)
        if token_env is not None:
            token = os.environ.get(token_env)
            if not token:
                raise ConfigError(f"option token_env: the environment variable {token_env!r} is not set")
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = build_opener(_NoRedirect())

    def post(self, body: bytes) -> tuple[str, bytes]:
        """Posts a request; returns content type and bytes of the answer.

        Raises:
            RewardError: no answer in time, one that is far too long, or an error status.
        """
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

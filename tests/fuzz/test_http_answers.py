"""Whatever a server of a reward answers: finite numbers, one a video, or an error of this reward that names it."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from euphonium.errors import RewardError
from euphonium.rewards.http import HttpReward
from tests.fuzz.harness import fuzz, taken_or_refused
from tests.fuzz.values import TEXT, VALUES

VIDEOS = torch.zeros(2, 1, 3, 2, 2)
KINDS = st.sampled_from(
    [
        "application/json",
        "application/json; charset=utf-16",
        "application/octet-stream",
        "text/html",
        "",
        "é",
        "a" * 500,
    ]
)
SCORES = st.lists(st.one_of(st.floats(), st.integers(), VALUES), max_size=3)
BODIES = st.one_of(
    st.binary(max_size=100),
    SCORES.map(lambda scores: json.dumps({"scores": scores}, default=str).encode()),
    VALUES.map(lambda value: json.dumps(value, default=str).encode()),
    st.sampled_from([b"[" * 50_000, b'{"scores": [' + b"9" * 5000 + b", 1]}", b'{"scores": [1e999, 1]}',
                     b"\xff\xfe", b"null"]),
    st.tuples(
        st.lists(st.integers(0, 3), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.int64,
        torch.bool])
    ).map(lambda made: save({"scores": torch.zeros(made[0], dtype=made[1])})),
    st.binary(max_size=30).map(lambda tail: save({"scores": torch.ones(2)})[:-4] + tail),
)  # fmt: skip


@dataclass
class Answer:
    """What the server says next."""

    status: int = 200
    kind: str = ""
    body: bytes = b""
    length: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Answer]]:
    answer = Answer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/", answer
    http.shutdown()
    http.server_close()


ODD_CHUNK = {"Transfer-Encoding": "chunked"}


@fuzz()
@example(status=200, kind="", body=b"-" + b"f" * 20 + b"\r\n", length=None, headers=ODD_CHUNK)
@example(status=500, kind="", body=b"-" + b"f" * 20 + b"\r\n", length=None, headers=ODD_CHUNK)
@example(status=200, kind="", body=b"-9\r\n", length=None, headers=ODD_CHUNK)
@example(status=500, kind="", body=b"", length=1000, headers={})
@given(
    status=st.sampled_from([200, 200, 200, 201, 204, 301, 307, 400, 401, 418, 429, 500, 503, 999]),
    kind=KINDS, body=BODIES, length=st.sampled_from([None, None, None, 0, 1, 1000]),
    headers=st.dictionaries(
        st.sampled_from(["Location", "Content-Encoding", "Transfer-Encoding", "X"]),
        st.sampled_from(["http://127.0.0.1:1/", "gzip", "chunked", "x" * 500]), max_size=2,
    ),
)  # fmt: skip
def test_answers(
    server: tuple[str, Answer], status: int, kind: str, body: bytes, length: int | None, headers: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    url, answer = server
    answer.status, answer.kind, answer.body, answer.length, answer.headers = status, kind, body, length, headers
    reward = HttpReward(HttpReward.Options(url=url, timeout_s=5))

    def score() -> torch.Tensor:
        try:
            return reward.score(VIDEOS, ["a", "b"])
        except RewardError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} is no error of a reward") from error

    scores = taken_or_refused(score, [url], tmp_path)
    if scores is not None:
        assert status in (200, 201)
        assert scores.shape == (2,)
        assert bool(torch.isfinite(scores).all())


@fuzz(0.2)
@given(
    url=st.one_of(
        TEXT, TEXT.map("http://".__add__), st.sampled_from(["http://[", "http://a:b/", "http://\x00/", "file:///etc"])
    )
)
def test_addresses(url: str, tmp_path: Path) -> None:
    taken_or_refused(lambda: HttpReward(HttpReward.Options(url=url)), ["url"], tmp_path)

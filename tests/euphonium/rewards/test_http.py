"""The HTTP reward against a real server on a thread of this process."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError, RewardError
from euphonium.rewards.http import HttpReward
from euphonium.rewards.registry import build_reward
from tests.euphonium.rewards.servers import Answer, Server

JSON = "application/json"
TENSORS = "application/octet-stream"


def reward_at(url: str, **options: object) -> HttpReward:
    return HttpReward(HttpReward.Options(url=url, **options))  # type: ignore[arg-type]


def brightness_as_json(headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
    videos = load(body)["videos"].float() / 255
    return 200, JSON, json.dumps({"scores": videos.mean(dim=(1, 2, 3, 4)).tolist(), "model": "mean"}).encode()


def brightness_as_tensors(headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
    videos = load(body)["videos"].float() / 255
    return 200, TENSORS, save({"scores": videos.mean(dim=(1, 2, 3, 4))})


VIDEOS = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1, 1).expand(3, 2, 3, 8, 6)
PROMPTS = ["one", 'two "quoted"', "drei ä"]


@pytest.mark.parametrize("answer", [brightness_as_json, brightness_as_tensors])
def test_a_scorer_is_asked_and_heard(
    serve: Callable[[Answer], Server], answer: Answer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = serve(answer)
    scores = reward_at(server.url).score(VIDEOS, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.2, 1.0]), atol=1e-6, rtol=0)
    headers, body = server.requests[0]
    assert headers["content-type"] == TENSORS
    file = tmp_path_factory.mktemp("request") / "body.safetensors"
    file.write_bytes(body)
    with safe_open(file, "pt") as held:
        assert json.loads(held.metadata()["prompts"]) == PROMPTS
        assert held.get_tensor("videos").dtype == torch.uint8
        assert held.get_tensor("videos").shape == VIDEOS.shape


@pytest.mark.parametrize(
    ("options", "given", "sent"),
    [
        ({}, [{"objects": ["car"]}, {}, {}], None),
        ({"metadata": True}, [{"objects": ["car"]}, {}, {}], [{"objects": ["car"]}, {}, {}]),
        ({"metadata": True}, (), [{}, {}, {}]),
    ],
)
def test_metadata_travel_on_request(
    options: dict[str, bool], given: Any, sent: Any, serve: Callable[[Answer], Server], tmp_path: Path
) -> None:
    server = serve(brightness_as_json)
    reward_at(server.url, **options).score(VIDEOS, PROMPTS, given)
    (tmp_path / "body.safetensors").write_bytes(server.requests[0][1])
    with safe_open(tmp_path / "body.safetensors", "pt") as held:
        assert json.loads(held.metadata().get("metadata", "null")) == sent


def test_floats_travel_unrounded_on_request(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda headers, body: (200, TENSORS, save({"scores": load(body)["videos"].mean(dim=(1, 2, 3, 4))})))
    videos = torch.rand(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = reward_at(server.url, dtype="float32").score(videos, ["", ""])
    torch.testing.assert_close(scores, videos.mean(dim=(1, 2, 3, 4)))


def test_a_token_comes_from_the_environment(serve: Callable[[Answer], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(brightness_as_json)
    monkeypatch.setenv("SCORER_TOKEN", "opensesame")
    reward_at(server.url, token_env="SCORER_TOKEN").score(VIDEOS, PROMPTS)
    assert server.requests[0][0]["authorization"] == "Bearer opensesame"
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(ConfigError, match="variable 'SCORER_TOKEN' is not set"):
        reward_at(server.url, token_env="SCORER_TOKEN")


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (JSON, b'{"scores": [0.1, NaN, 0.2]}', "not one finite number a video"),
        (JSON, b'{"scores": [0.1, Infinity, 0.2]}', "not one finite number a video"),
        (JSON, b'{"scores": [1e999, 0, 0.2]}', "not one finite number a video"),
        (JSON, b'{"scores": [0.1, 0.2]}', "for 3 videos: not one finite number"),
        (JSON, b'{"scores": [0.1, null, 0.2]}', "no list of numbers"),
        (JSON, b'{"scores": [0.1, true, 0.2]}', "no list of numbers"),
        (JSON, b'{"scores": "high"}', "no list of numbers"),
        (JSON, b'{"score": [0, 0, 0]}', "no 'scores' in it"),
        (JSON, b"[0, 0, 0]", "no 'scores' in it"),
        (JSON, b"sorry", "unreadable"),
        (TENSORS, b"sorry", "unreadable"),
        (TENSORS, save({"scores": torch.tensor([0.0, float("nan"), 1.0])}), "not one finite number a video"),
        (TENSORS, save({"scores": torch.zeros(3, 1)}), "not one finite number a video"),
        (TENSORS, save({"scores": torch.zeros(3, dtype=torch.int64)}), "not floating point"),
        (TENSORS, save({"other": torch.zeros(3)}), "no 'scores' in it"),
        ("application/x-pickle", b"\x80\x04N.", "content type 'application/x-pickle'"),
        ("text/html", b"<html>", "content type 'text/html'"),
        (JSON, b'{"scores": [' + b" " * (5 << 20) + b"0,0,0]}", "more than 4194304 bytes"),
    ],
)
def test_an_answer_that_is_no_scores_is_an_error(
    serve: Callable[[Answer], Server], kind: str, body: bytes, message: str
) -> None:
    server = serve(lambda headers, sent: (200, kind, body))
    with pytest.raises(RewardError, match=message):
        reward_at(server.url).score(VIDEOS, PROMPTS)


@pytest.mark.parametrize("status", [302, 404, 500])
def test_error_statuses_and_redirects_are_errors(serve: Callable[[Answer], Server], status: int) -> None:
    server = serve(lambda headers, body: (status, "text/plain", b"out of memory"))
    with pytest.raises(RewardError, match=rf"HTTP {status}: out of memory"):
        reward_at(server.url).score(VIDEOS, PROMPTS)


def test_a_slow_scorer_is_given_up(serve: Callable[[Answer], Server]) -> None:
    release = threading.Event()

    def late(headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        release.wait(10)
        return brightness_as_json(headers, body)

    server = serve(late)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"did not answer within 0.3 s"):
        reward_at(server.url, timeout_s=0.3).score(VIDEOS, PROMPTS)
    assert time.monotonic() - began < 5
    release.set()


def test_an_answer_that_drips_is_given_up() -> None:
    """Every packet comes in time, all of them do not."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 20)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    reward = reward_at(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.4)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"within 0.4 s"):
        reward.score(VIDEOS, PROMPTS)
    assert time.monotonic() - began < 5
    stop.set()
    thread.join(timeout=5)
    listener.close()


def test_nobody_listening_is_an_error(serve: Callable[[Answer], Server]) -> None:
    server = Server(brightness_as_json)
    server.stop()
    with pytest.raises(RewardError, match="cannot reach"):
        reward_at(server.url, timeout_s=2).score(VIDEOS, PROMPTS)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "localhost:80", "http://"])
def test_only_http_addresses_are_taken(url: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards.outcome \(judge\).options: option url"):
        build_reward(OutcomeRewardConfig(name="judge", type="http", options={"url": url}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'url' is missing"),
        ({"url": "http://h/", "timeout_s": 0}, "timeout_s: input should be greater than 0, got 0"),
        ({"url": "http://h/", "dtype": "int8"}, "dtype: input should be 'uint8' or 'float32', got 'int8'"),
        ({"url": "http://h/", "timeout": 3}, "unknown key 'timeout'; did you mean 'timeout_s'?"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward(OutcomeRewardConfig(name="judge", type="http", options=options))
    assert str(caught.value) == f"rewards.outcome (judge).options: {message}"

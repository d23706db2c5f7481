"""The judge against a real server of the OpenAI protocol on a thread of this process."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError, RewardError
from euphonium.rewards.registry import build_reward
from euphonium.rewards.vlm_judge import VlmJudge
from tests.euphonium.rewards.servers import Answer, Server, completion

QUESTION = 'How well do the pictures show "{prompt}"?'


def brightness(_: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
    """A judge that scores the mean level of the pictures it was sent."""
    content = json.loads(body)["messages"][0]["content"]
    pictures = [part["image_url"]["url"].partition("base64,")[2] for part in content if part["type"] == "image_url"]
    levels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))).mean() for p in pictures]
    return completion(json.dumps({"score": float(np.mean(levels)) / 25.5}))


def judge(url: str, **options: Any) -> VlmJudge:
    base = url.removesuffix("/score") + "/v1"
    return VlmJudge(VlmJudge.Options(url=base, model="judge", question=QUESTION, **options))


def test_every_video_is_judged_by_its_own_pictures(serve: Callable[[Answer], Server]) -> None:
    server = serve(brightness)
    levels = torch.tensor([0.0, 0.2, 0.6, 1.0])
    videos = levels.view(4, 1, 1, 1, 1).expand(4, 9, 3, 8, 8).contiguous()
    scores = judge(server.url, frames=3).score(videos, ["a", "b", "c", "d"])
    torch.testing.assert_close(scores, 10 * levels)
    asked = {json.loads(body)["messages"][0]["content"][0]["text"]: json.loads(body) for _, body in server.requests}
    assert set(asked) == {QUESTION.replace("{prompt}", prompt) for prompt in "abcd"}
    sent = asked[QUESTION.replace("{prompt}", "a")]
    assert len(sent["messages"][0]["content"]) == 4
    assert (sent["model"], sent["temperature"], sent["seed"]) == ("judge", 0.0, 0)
    schema = sent["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 0.0, "maximum": 10.0}


def test_a_fence_around_the_answer_is_no_harm(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda *_: completion('```json\n{"score": 7}\n```'))
    assert judge(server.url, structured="none").score(torch.zeros(1, 1, 3, 8, 8), ["p"]).tolist() == [7.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion("The score is 7."), "gave no score"),
        (completion("7"), "no number 'score'"),
        (completion('{"score": "7"}'), "no number 'score'"),
        (completion('{"score": true}'), "no number 'score'"),
        (completion('{"score": NaN}'), "no number 'score'"),
        (completion('{"score": 11}'), "11 is not from 0 to 10"),
        (completion('{"rating": 7}'), "no number 'score'"),
        (completion('{"score": 7', finish="length"), "ended by 'length'.*raise max_tokens"),
        (completion(None, refusal="I cannot"), "the model refuses"),
        (completion(None), "gave no score"),
        ((200, "application/json", b"{}"), "gave no score"),
        ((200, "application/json", b"\xff"), "gave no score"),
        ((200, "text/html", b"<p>7</p>"), "content type 'text/html'"),
        ((500, "application/json", b'{"error": "out of memory"}'), "HTTP 500: .*out of memory"),
        ((302, "application/json", b"{}"), "HTTP 302"),
    ],
)
def test_what_is_no_score_is_never_a_number(
    answer: tuple[int, str, bytes],
    message: str,
    serve: Callable[[Answer], Server],
) -> None:
    server = serve(lambda *_: answer)
    with pytest.raises(RewardError, match=message):
        judge(server.url).score(torch.zeros(2, 1, 3, 8, 8), ["p", "q"])


def test_the_key_is_sent_and_not_in_the_recipe(
    serve: Callable[[Answer], Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(brightness)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge(server.url, token_env="JUDGE_KEY").score(torch.zeros(1, 1, 3, 8, 8), ["p"])
    assert server.requests[0][0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "judge:8000"}, "no http:// or https:// address"),
        ({"token_env": "NOT_SET_ANYWHERE"}, "is not set"),
        ({"question": "How good is it?"}, r"question has no \{prompt\}"),
        ({"low": 5, "high": 5}, "low .* is not below high"),
        ({"modle": "x"}, "did you mean 'model'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    given = {"url": "http://judge/v1", "model": "m", "question": QUESTION} | options
    with pytest.raises(ConfigError, match=message):
        build_reward(OutcomeRewardConfig(name="judge", type="vlm_judge", options=given))

"""The checklist against a real server of the OpenAI protocol on a thread of this process."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError, RewardError
from euphonium.rewards.base import OutcomeReward
from euphonium.rewards.registry import build_reward
from tests.euphonium.rewards.servers import Answer, Server, completion

QUESTIONS = "Is the video bright?\n\nDoes it show [[prompt]]?\nIs it dark, as {prompt} should be?\n"
WEIGHTS = [0.5, 2.0, -0.25]


@pytest.fixture
def checklist(tmp_path: Path) -> Callable[..., OutcomeReward]:
    def build(
        url: str, questions: str = QUESTIONS, weights: Any = WEIGHTS, options: dict[str, Any] | None = None
    ) -> OutcomeReward:
        (tmp_path / "questions.txt").write_text(questions)
        (tmp_path / "weights.json").write_text(weights if isinstance(weights, str) else json.dumps(weights))
        files = {"questions": str(tmp_path / "questions.txt"), "weights": str(tmp_path / "weights.json")}
        given = {"url": url.removesuffix("/score") + "/v1", "model": "judge"} | files | (options or {})
        return build_reward(OutcomeRewardConfig(name="list", type="vlm_checklist", options=given))

    return build


def looks(_: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
    """Answers by the mean level of the picture that it was sent, and knows a cat when it reads of one."""
    text, picture = json.loads(body)["messages"][0]["content"]
    held = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
    bright = np.asarray(Image.open(io.BytesIO(held))).mean() > 127
    question = text["text"]
    yes = {"Is the video": bright, "Does it show": "a cat" in question, "Is it dark, ": not bright}[question[:12]]
    return completion("Yes, it is." if yes else "no")


def test_a_score_is_the_mean_of_weighted_answers(
    serve: Callable[[Answer], Server], checklist: Callable[..., OutcomeReward]
) -> None:
    server = serve(looks)
    videos = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 5, 3, 8, 8)
    scores = checklist(server.url, options={"frames": 1}).score(videos, ["a cat", "a dog"])
    expected = [(-0.5 + 2.0 - 0.25) / 3, (0.5 - 2.0 + 0.25) / 3]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert len(server.requests) == 6
    assert "Is it dark, as a dog should be?" in {
        json.loads(body)["messages"][0]["content"][0]["text"] for _, body in server.requests
    }


def test_without_weights_all_questions_count_alike(
    serve: Callable[[Answer], Server], checklist: Callable[..., OutcomeReward]
) -> None:
    server = serve(looks)
    video = torch.ones(1, 5, 3, 8, 8)
    scores = checklist(server.url, options={"frames": 1, "weights": None}).score(video, ["a cat"])
    torch.testing.assert_close(scores, torch.tensor([1 / 3]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion("Perhaps."), "begins with neither yes nor no"),
        (completion("Nothing of it"), "begins with neither yes nor no"),
        (completion(""), "begins with neither yes nor no"),
        (completion(None), "gave no score"),
        (completion("yes", finish="length"), "raise max_tokens"),
        ((200, "text/html", b"yes"), "content type 'text/html'"),
        ((500, "application/json", b"{}"), "HTTP 500"),
    ],
)
def test_what_is_no_answer_is_never_a_number(
    answer: tuple[int, str, bytes],
    message: str,
    serve: Callable[[Answer], Server],
    checklist: Callable[..., OutcomeReward],
) -> None:
    server = serve(lambda *_: answer)
    with pytest.raises(RewardError, match=message):
        checklist(server.url).score(torch.zeros(1, 1, 3, 8, 8), ["p"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"questions": "\n \n"}, "has no question; write one a line"),
        ({"weights": [1, 2]}, "holds 2 numbers; write a list of 3"),
        ({"weights": [1, True, 2]}, "write a list of 3, one for each question"),
        ({"weights": "[1, 2"}, "is no JSON"),
        ({"weights": "[1, 2, NaN]"}, "write a list of 3, one for each question"),
        ({"url": "judge:8000"}, "no http:// or https:// address"),
        ({"options": {"low": 0}}, "unknown key 'low'"),
    ],
)
def test_a_checklist_that_cannot_work_is_refused(
    given: dict[str, Any], message: str, checklist: Callable[..., OutcomeReward]
) -> None:
    with pytest.raises(ConfigError, match=message):
        checklist(**({"url": "http://judge/v1"} | given))


def test_a_missing_file_is_named(checklist: Callable[..., OutcomeReward]) -> None:
    with pytest.raises(ConfigError, match=r"option weights: .*nowhere\.json"):
        checklist("http://judge/v1", options={"weights": "nowhere.json"})

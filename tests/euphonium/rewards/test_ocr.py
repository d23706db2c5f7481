"""The OCR reward against strings that Pillow rendered: what they say is known."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.ocr import OcrReward, accuracy, edit_distance, plain, quoted_text
from euphonium.rewards.registry import build_reward

PROMPT = 'a wooden sign that says "Hello World"'


def picture(text: str, size: int = 28, colours: tuple[str, str] = ("black", "white")) -> Tensor:
    """``[3, 96, 256]`` with the text in its middle left."""
    image = Image.new("RGB", (256, 96), colours[1])
    ImageDraw.Draw(image).text((16, 30), text, fill=colours[0], font=ImageFont.load_default(size=size))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward(OcrReward.Options())


def test_strings_are_ordered_by_how_much_of_the_text_is_right(reward: OcrReward) -> None:
    texts = ["Hello World", "Hello Worlt", "Hello", "Jungle", ""]
    videos = torch.stack([picture(text) for text in texts])[:, None]
    scores = reward.score(videos, [PROMPT] * len(texts))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:3], torch.tensor([1.0, 0.9, 0.5]), atol=1e-6, rtol=0)
    assert 0 <= float(scores[3]) < 0.4
    assert float(scores[4]) == 0


@pytest.mark.parametrize("text", ["EUPHONIUM", "flow 42", "Open Daily"])
@pytest.mark.parametrize(("size", "colours"), [(20, ("black", "white")), (36, ("white", "#204080"))])
def test_rendered_truth_is_read(reward: OcrReward, text: str, size: int, colours: tuple[str, str]) -> None:
    scores = reward.score(picture(text, size, colours)[None, None], [f'a poster with "{text}" on it'])
    assert float(scores) == 1


def test_frames_are_averaged_or_the_best_one_counts() -> None:
    video = torch.stack([picture("Hello World"), picture(""), picture(""), picture("Hello World")])[None]
    assert float(OcrReward(OcrReward.Options(frames=4)).score(video, [PROMPT])) == pytest.approx(0.5)
    assert float(OcrReward(OcrReward.Options(frames=4, reduce="max")).score(video, [PROMPT])) == 1
    assert float(OcrReward(OcrReward.Options(frames=2)).score(video, [PROMPT])) == 1  # the first and the last


def test_other_text_in_the_picture_is_counted_unless_it_is_free() -> None:
    image = torch.cat([picture("Hello World"), picture("Tomato")], dim=1)[None, None]
    counted, free = (
        float(OcrReward(OcrReward.Options(extra_text=how)).score(image, [PROMPT])) for how in ("counted", "free")
    )
    assert counted == pytest.approx(1 - 6 / 10)
    assert free == 1


def test_case_matters_on_request() -> None:
    image = picture("HELLO WORLD")[None, None]
    assert float(OcrReward(OcrReward.Options()).score(image, [PROMPT])) == 1
    assert float(OcrReward(OcrReward.Options(case_sensitive=True)).score(image, [PROMPT])) < 0.5


def test_a_prompt_without_quoted_text_is_refused(reward: OcrReward) -> None:
    with pytest.raises(ValueError, match="double quotation marks in the prompt, got 'a sign'"):
        reward.score(picture("Hello")[None, None], ["a sign"])


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('"One" and "Two"', "One Two"),
        ("a “curly” sign", "curly"),
        ("sign 「東京」", "東京"),
        ("it's \"Bob's\"", "Bob's"),
    ],
)
def test_quotation_marks(prompt: str, wanted: str) -> None:
    assert quoted_text(prompt) == wanted


@pytest.mark.parametrize(
    ("read", "wanted", "distance", "anywhere"),
    [
        ("kitten", "sitting", 3, 3), ("", "abc", 3, 3), ("abc", "abc", 0, 0), ("xxabcyy", "abc", 4, 0),
        ("xxabdyy", "abc", 5, 1), ("flaw", "lawn", 2, 1),
    ],
)  # fmt: skip
def test_known_edit_distances(read: str, wanted: str, distance: int, anywhere: int) -> None:
    assert edit_distance(read, wanted) == distance
    assert edit_distance(read, wanted, anywhere=True) == anywhere


@given(st.text(max_size=8), st.text(min_size=1, max_size=8), st.text(max_size=4), st.text(max_size=4))
def test_edit_distance_is_symmetric_bounded_and_free_of_surroundings(
    read: str, wanted: str, before: str, after: str
) -> None:
    assert edit_distance(read, wanted) == edit_distance(wanted, read) <= max(len(read), len(wanted))
    assert edit_distance(read, wanted, anywhere=True) <= edit_distance(read, wanted)
    assert edit_distance(before + wanted + after, wanted, anywhere=True) == 0
    assert 0 <= accuracy(read, wanted) <= 1


def test_width_spaces_and_case_do_not_matter_in_plain_text() -> None:
    assert plain("Ｈｅｌｌｏ  World\n") == "helloworld"
    assert plain("Ab", case_sensitive=True) == "Ab"


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"'ocr' needs the package '{missing}'.*pip install '.\[rewards\]'"):
        build_reward(OutcomeRewardConfig(name="text", type="ocr"))


@pytest.mark.parametrize("options", [{"reduce": "median"}, {"frames": 0}, {"extra_text": "no"}, {"colour": 1}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"rewards.outcome \(text\)"):
        build_reward(OutcomeRewardConfig(name="text", type="ocr", options=options))

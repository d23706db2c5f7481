import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from euphonium.config import OutcomeRewardConfig
from euphonium.embedded.sprites import BACKGROUNDS, DIRECTIONS, ICONS, Scene, all_scenes, parse_caption, split_scenes
from euphonium.embedded.sprites.render import render
from euphonium.rewards.registry import build_rewards

REWARDS = build_rewards(
    [OutcomeRewardConfig(name=name, type=f"sprite_{name}") for name in ("icon", "motion", "background", "quality")]
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return all_scenes()[::5]


@pytest.fixture(scope="module")
def clips(scenes: list[Scene]) -> Tensor:
    return render(scenes, torch.Generator().manual_seed(0))


def captions(scenes: list[Scene]) -> list[str]:
    return [scene.caption for scene in scenes]


@pytest.mark.parametrize(
    ("name", "worst", "mean"),
    [("icon", 0.75, 0.95), ("motion", 0.9, 0.99), ("background", 0.9, 0.98), ("quality", 0.9, 0.97)],
)
def test_rendered_truth_scores_high(name: str, worst: float, mean: float, scenes: list[Scene], clips: Tensor) -> None:
    scores = REWARDS[name].score(clips, captions(scenes))
    assert scores.shape == (len(scenes),)
    assert float(scores.min()) > worst
    assert float(scores.mean()) > mean


@pytest.mark.parametrize("name", ["icon", "motion", "background"])
def test_a_wrong_caption_scores_low(name: str, scenes: list[Scene], clips: Tensor) -> None:
    pick = random.Random(0)

    def other(word: str, words: dict) -> str:
        return pick.choice([w for w in words if w != word])

    wrong = [
        Scene(other(s.icon, ICONS), other(s.direction, DIRECTIONS), other(s.background, BACKGROUNDS)) for s in scenes
    ]
    scores = REWARDS[name].score(clips, captions(wrong))
    assert float(scores.mean()) < 0.02
    assert float(scores.max()) < 0.3


@pytest.mark.parametrize("name", list(REWARDS))
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_scores_low(name: str, kind: str, scenes: list[Scene]) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (len(scenes), 9, 3, 32, 32)
    noise = torch.rand(shape, generator=generator)
    if kind == "gaussian":
        noise = (0.5 + 0.3 * torch.randn(shape, generator=generator)).clamp(0, 1)
    assert float(REWARDS[name].score(noise, captions(scenes)).mean()) < 0.1


@pytest.mark.parametrize("name", ["icon", "motion", "quality"])
def test_an_empty_clip_scores_zero(name: str, scenes: list[Scene], clips: Tensor) -> None:
    empty = clips[:, :1, :, :1, :1].expand(-1, 9, -1, 32, 32).contiguous()
    assert float(REWARDS[name].score(empty, captions(scenes)).max()) == 0


def test_quality_falls_with_blur_and_with_noise(scenes: list[Scene], clips: Tensor) -> None:
    def quality(videos: Tensor) -> float:
        return float(REWARDS["quality"].score(videos, captions(scenes)).mean())

    flat = clips.flatten(0, 1)
    blurred = [functional.avg_pool2d(flat, k, 1, k // 2, count_include_pad=False).view_as(clips) for k in (3, 5, 7)]
    blur = [quality(clips), *map(quality, blurred)]
    assert blur == sorted(blur, reverse=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clips.shape, generator=generator)
    noisy = [quality((clips + amount * noise).clamp(0, 1)) for amount in (0.0, 0.05, 0.1, 0.3)]
    assert noisy == sorted(noisy, reverse=True)


def test_motion_falls_with_speed_and_with_sideways_drift() -> None:
    scene = Scene("red car", "right", "white")
    clip = render([scene], torch.Generator().manual_seed(0))
    frames = [0, 0, 1, 1, 2, 2, 3, 3, 4]
    slow = clip[:, frames]
    still = clip[:, [4] * 9]
    fast, half, none = (float(REWARDS["motion"].score(v, [scene.caption])) for v in (clip, slow, still))
    assert fast > 0.9 > half > 0.2
    assert none < 1e-6
    assert float(REWARDS["motion"].score(clip.flip(1), [scene.caption])) == 0
    down = Scene("red car", "down", "white")
    assert float(REWARDS["motion"].score(clip, [down.caption])) == 0


@pytest.mark.parametrize("name", list(REWARDS))
def test_scores_are_bounded_and_deterministic(name: str, scenes: list[Scene], clips: Tensor) -> None:
    first = REWARDS[name].score(clips, captions(scenes))
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    again = REWARDS[name].score(clips.clone(), captions(scenes))
    assert torch.equal(first, again)
    alone = REWARDS[name].score(clips[3:4], captions(scenes)[3:4])
    torch.testing.assert_close(first[3:4], alone, atol=1e-4, rtol=1e-4)


def test_clips_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[batch, frames, 3, 32, 32\]"):
        REWARDS["icon"].score(torch.rand(1, 9, 3, 48, 48), [all_scenes()[0].caption])


def test_captions_read_back() -> None:
    for scene in all_scenes():
        assert parse_caption(scene.caption) == scene


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat", "no caption"),
        ("a red cat moving left on a green background", "unknown icon 'red cat'"),
        ("a red car moving back on a green background", "unknown direction 'back'"),
        ("a red car moving left on a pink background", "unknown background 'pink'"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_the_split_keeps_combinations_apart_and_every_word_on_both_sides() -> None:
    seen, held_out = split_scenes()
    assert not set(seen) & set(held_out)
    assert len(seen) + len(held_out) == len(all_scenes())
    for field, words in (("icon", ICONS), ("direction", DIRECTIONS), ("background", BACKGROUNDS)):
        for side in (seen, held_out):
            assert {getattr(scene, field) for scene in side} == set(words)

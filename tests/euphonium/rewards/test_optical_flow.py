"""The flow reward against a texture that moves along known paths."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.optical_flow import OpticalFlowReward
from euphonium.rewards.registry import build_reward

SIZE = 96
STEADY = [(2.0 * k, 1.0 * k) for k in range(8)]


def texture(seed: int = 0, cells: int = 40, size: int = 320) -> Tensor:
    noise = torch.rand(1, 3, cells, cells, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)


def window(image: Tensor, x: float, y: float) -> Tensor:
    """``[3, SIZE, SIZE]`` of a texture, its corner at any fraction of a pixel."""
    extent = image.shape[-1] - 1
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 60 - y, torch.arange(SIZE) + 60 - x, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1)[None] / extent * 2 - 1
    return functional.grid_sample(image, grid.float(), align_corners=True)[0]


def clip(path: list[tuple[float, float]]) -> Tensor:
    return torch.stack([window(texture(), x, y) for x, y in path])


def jittered(amount: float) -> list[tuple[float, float]]:
    noise = amount * torch.randn(len(STEADY), 2, generator=torch.Generator().manual_seed(1))
    return [(x + float(dx), y + float(dy)) for (x, y), (dx, dy) in zip(STEADY, noise, strict=True)]


def reward_with(**options: object) -> OpticalFlowReward:
    return OpticalFlowReward(OpticalFlowReward.Options(**options))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["dis", "farneback"])
def reward(request: pytest.FixtureRequest) -> OpticalFlowReward:
    return reward_with(method=request.param, side=SIZE)


def test_a_known_shift_is_measured(reward: OpticalFlowReward) -> None:
    motion = reward.measure(clip(STEADY))
    assert motion.speed * SIZE == pytest.approx(5**0.5, abs=0.1)
    assert motion.acceleration * SIZE < 0.05


def test_a_known_acceleration_is_measured(reward: OpticalFlowReward) -> None:
    motion = reward.measure(clip([(0.5 * k * k / 2, 0.0) for k in range(8)]))
    assert motion.acceleration * SIZE == pytest.approx(0.5, abs=0.08)


def test_smooth_motion_is_ordered_above_jitter_above_shuffled_frames(reward: OpticalFlowReward) -> None:
    shuffled = [STEADY[k] for k in (3, 0, 7, 1, 5, 2, 6, 4)]
    videos = torch.stack([clip(path) for path in (STEADY, jittered(0.2), jittered(0.6), jittered(2.0), shuffled)])
    scores = reward.score(videos, [""] * 5)
    assert scores.dtype == torch.float32
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert float(scores[0]) > 0.95
    assert float(scores[1]) < 0.85
    assert float(scores[3]) < 0.1
    assert float(scores.min()) >= 0


def test_an_object_over_a_resting_background_is_smooth(reward: OpticalFlowReward) -> None:
    image, patch = window(texture(), 0, 0), texture(seed=5)[0, :, :32, :32]
    frames = []
    for k in range(8):
        frame = image.clone()
        frame[:, 30:62, 4 + 4 * k : 36 + 4 * k] = patch
        frames.append(frame)
    steady = torch.stack(frames)
    shaken = steady[[0, 1, 0, 1, 2, 1, 2, 3]]
    scores = reward.score(torch.stack([steady, shaken]), ["", ""])
    assert float(scores[0]) > float(scores[1]) + 0.2


def test_a_cut_and_flicker_score_below_the_same_clip_without(reward: OpticalFlowReward) -> None:
    plain = clip(STEADY)
    cut = plain.clone()
    cut[4:] = torch.stack([window(texture(seed=9), x, y) for x, y in STEADY[4:]])
    scores = reward.score(torch.stack([plain, cut]), ["", ""])
    assert float(scores[0]) > float(scores[1]) + 0.1


def test_a_still_clip_is_smooth_unless_motion_is_asked_for() -> None:
    still, moving = clip([(0.0, 0.0)] * 8), clip(STEADY)
    assert float(reward_with().score(still[None], [""])) > 0.99
    demanding = reward_with(least_speed=0.02).score(torch.stack([still, moving]), ["", ""])
    assert float(demanding[0]) < 0.01
    assert float(demanding[1]) > 0.9


def test_scores_do_not_depend_on_resolution_or_batch() -> None:
    reward = reward_with()
    small = clip(jittered(0.5))
    large = functional.interpolate(small, scale_factor=2.5, mode="bicubic").clamp(0, 1)
    first, second = float(reward.score(small[None], [""])), float(reward.score(large[None], [""]))
    assert first == pytest.approx(second, abs=0.03)
    both = reward.score(torch.stack([small, small]), ["", ""])
    assert both.tolist() == [first, first]


def test_two_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        reward_with().score(torch.rand(1, 2, 3, 64, 64), [""])


def test_opencv_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"'optical_flow' needs the package 'cv2'.*pip install '.\[rewards\]'"):
        build_reward(OutcomeRewardConfig(name="smooth", type="optical_flow"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "raft"}, "method: input should be 'dis' or 'farneback', got 'raft'"),
        ({"side": 8}, "side: input should be greater than or equal to 32, got 8"),
        ({"tolerance": 0.0, "thread": 2}, "tolerance: input should be greater than 0, got 0.0; unknown key 'thread'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward(OutcomeRewardConfig(name="smooth", type="optical_flow", options=options))
    assert str(caught.value).startswith(f"rewards.outcome (smooth).options: {message}")

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import RunConfig
from core.errors import ConfigError, RewardError
from models.generators.base import open_generator
from reward_servers.orm import OrmScorer

CPU = torch.device("cpu")
PROMPT = "a red car moving left on a white background"
MakeConfig = Callable[..., RunConfig]


class BrokenReward:
    """A reward of a user, which may fail in several ways."""

    def __init__(self, how: str) -> None:
        self.how = how

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.how == "raises":
            raise OSError("no route to judge")
        if self.how == "shape":
            return torch.zeros(len(videos), 2)
        scores = videos.mean(dim=(1, 2, 3, 4))
        scores[-1] = float(self.how)
        return scores


def scorer_of(config: RunConfig) -> OrmScorer:
    return OrmScorer(config.rewards.outcome, open_generator(config.model), CPU)


def custom(make_config: MakeConfig, how: str) -> RunConfig:
    spec = f"[{{name: mine, type: 'reward_server_test_rewards:BrokenReward', options: {{how: '{how}'}}}}]"
    return make_config(f"rewards.outcome={spec}")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a module of the user's on the path."""
    import sys
    import types

    module = types.ModuleType("reward_server_test_rewards")
    module.BrokenReward = BrokenReward  # type: ignore[attr-defined]
    module.NoReward = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reward_server_test_rewards", module)


def latents(count: int = 3) -> np.ndarray:
    return torch.randn(count, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0)).numpy()


def test_scores_latents_by_every_reward(make_config: MakeConfig) -> None:
    scorer = scorer_of(make_config())
    scores = scorer.score(latents(), [PROMPT] * 3)
    assert set(scores) == {"icon", "motion", "quality"}
    for values in scores.values():
        assert values.shape == (3,)
        assert values.dtype == np.float32
    videos = scorer.videos(latents())
    assert videos.shape == (3, 9, 32, 32, 3)
    assert videos.dtype == np.uint8


def test_large_batches_are_cut_and_joined(make_config: MakeConfig) -> None:
    scorer = scorer_of(make_config())
    many = scorer.score(np.concatenate([latents(3)] * 7), [PROMPT] * 21)
    few = scorer.score(latents(3), [PROMPT] * 3)
    for name in few:
        np.testing.assert_allclose(many[name], np.tile(few[name], 7), atol=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [("raises", "'mine' failed: OSError: no route to judge"), ("nan", "not one finite number"),
     ("inf", "not one finite number"), ("shape", "not one finite number")],
)  # fmt: skip
def test_a_failing_reward_is_an_error_that_names_it(make_config: MakeConfig, how: str, message: str) -> None:
    scorer = scorer_of(custom(make_config, how))
    with pytest.raises(RewardError, match=message):
        scorer.score(latents(), [PROMPT] * 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sprite_icno", "did you mean 'sprite_icon'"),
        ("no_such_module:Reward", "cannot import"),
        ("reward_server_test_rewards:Nothing", "cannot import"),
        ("reward_server_test_rewards:BrokenReward", "cannot construct"),
        ("reward_server_test_rewards:NoReward", r"no method score"),
    ],
)
def test_an_unusable_reward_is_refused(make_config: MakeConfig, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer_of(make_config(f"rewards.outcome=[{{name: mine, type: '{kind}'}}]"))

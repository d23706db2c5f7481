"""How rewards of a recipe are found, checked and built, and what those of one network share."""

import sys
import types
from collections.abc import Sequence
from typing import Self

import pytest
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from euphonium.config import Node, OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.registry import build_reward, build_rewards, find_reward
from euphonium.rewards.shared import Analyser, Batch, SharedReward


class Declared:
    """A reward of a user, with declared options."""

    class Options(Node):
        least: PositiveInt = 1
        most: PositiveInt = 4

        @model_validator(mode="after")
        def _in_order(self) -> Self:
            if self.least > self.most:
                raise ValueError("least exceeds most")
            return self

    def __init__(self, options: Options) -> None:
        self.options = options

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(videos),), float(self.options.least))


class Mean(Analyser[Tensor]):
    """Mean of the pixels times a factor; counts its passes."""

    class Options(Node):
        factor: float = 1.0

    def __init__(self, options: Options) -> None:
        self.factor = options.factor
        self.passes = 0

    def analyse(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        self.passes += 1
        return self.factor * videos.mean(dim=(1, 2, 3, 4))


class Offset(SharedReward[Tensor]):
    analyser_class = Mean

    class Options(Mean.Options):
        offset: float = 0.0

    def __init__(self, options: Options, analyser: Mean) -> None:
        super().__init__(options, analyser)
        self.offset = options.offset

    def read(self, analysis: Tensor, prompts: Sequence[str]) -> Tensor:
        return analysis + self.offset


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a module of the user's on the path."""
    module = types.ModuleType("registry_test_rewards")
    module.Declared, module.Offset = Declared, Offset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "registry_test_rewards", module)


def entry(kind: str, name: str = "mine", **options: object) -> OutcomeRewardConfig:
    return OutcomeRewardConfig(name=name, type=kind, options=options)


def test_a_class_with_declared_options_gets_them_as_one_object() -> None:
    made = build_reward(entry("registry_test_rewards:Declared", most=7))
    assert isinstance(made, Declared)
    assert made.options == Declared.Options(least=1, most=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leats": 2}, "unknown key 'leats'; did you mean 'least'?"),
        ({"colour": 2}, "unknown key 'colour'; known here: least, most"),
        ({"least": "few"}, "least: input should be a valid integer, unable to parse string as an integer, got 'few'"),
        ({"least": 0, "mots": 2},
         "least: input should be greater than 0, got 0; unknown key 'mots'; did you mean 'most'?"),
        ({"least": 5}, "options: least exceeds most"),
    ],
)  # fmt: skip
def test_mistakes_in_declared_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward(entry("registry_test_rewards:Declared", **options))
    assert str(caught.value) == f"rewards.outcome (mine).options: {message}"


def test_a_reward_without_options_refuses_any() -> None:
    with pytest.raises(ConfigError, match=r"rewards.outcome \(mine\).options: unknown key 'frames'; known here: none$"):
        build_reward(entry("sprite_icon", frames=3))


def test_an_unknown_reward_is_answered_in_whole_sentences() -> None:
    with pytest.raises(ConfigError, match=r"built-in are sprite_icon, .*, http\. Your own go by package\.mod"):
        find_reward(entry("zzz"))
    with pytest.raises(ConfigError, match=r"did you mean 'sprite_icon'\? Your own go by"):
        find_reward(entry("sprite_icno"))


def test_rewards_that_differ_in_what_they_read_share_an_analyser_and_its_pass() -> None:
    kind = "registry_test_rewards:Offset"
    rewards = build_rewards(
        [entry(kind, "a"), entry(kind, "b", offset=2.0), entry(kind, "c", factor=3.0), entry("sprite_quality", "d")]
    )
    analysers = [reward.analyser for reward in rewards.values() if isinstance(reward, SharedReward)]
    assert analysers[0] is analysers[1]
    assert len({id(analyser) for analyser in analysers}) == 3
    videos = torch.rand(2, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for passes in (1, 2):
        batch = Batch(videos, ["", ""])
        scores = {name: batch.score(reward) for name, reward in rewards.items()}
        assert [analyser.passes for analyser in analysers if isinstance(analyser, Mean)] == [passes] * 3
    for name, reward in rewards.items():
        assert torch.equal(scores[name], reward.score(videos, ["", ""]))
    assert torch.equal(scores["b"], scores["a"] + 2)


def test_rewards_of_different_recipes_share_nothing() -> None:
    first, second = (build_reward(entry("registry_test_rewards:Offset")) for _ in range(2))
    assert isinstance(first, SharedReward)
    assert isinstance(second, SharedReward)
    assert first.analyser is not second.analyser

"""What one outcome reward does harms no other: its writes, its gradients, its failures."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from euphonium.config import Node, RunConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.generators.registry import open_generator
from euphonium.rewards.shared import Analyser, Batch, SharedReward
from reward_servers.batching import isolated
from reward_servers.orm import WHAT, OrmRequest, OrmScorer

MakeConfig = Callable[..., RunConfig]
PROMPT = "a red car moving left on a white background"
MODULE = "isolation_test_rewards"


class Writer:
    """Writes into whatever it is given."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = videos.mean(dim=(1, 2, 3, 4))
        videos.zero_()
        videos.numpy()[...] = 7.0
        assert isinstance(prompts, list)
        prompts.clear()
        return scores


class Mean:
    """A reward with a network of its own that forgot to switch gradients off."""

    def __init__(self) -> None:
        self.scale = torch.nn.Parameter(torch.ones(()))

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        assert list(prompts) == [PROMPT] * len(videos)
        with torch.enable_grad():
            return self.scale * videos.mean(dim=(1, 2, 3, 4))


class Listed:
    """Gives something else than a tensor."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> list[float]:
        return [0.0] * len(videos)


class Failing:
    """Fails in a way of choice, on prompts with a word of choice."""

    def __init__(self, how: str, word: str = "") -> None:
        self.how = how
        self.word = word

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        if not any(self.word in prompt for prompt in prompts):
            return torch.ones(len(videos))
        if self.how == "raises":
            raise OSError("no route to judge")
        if self.how == "shape":
            return torch.zeros(len(videos), 2)
        return torch.full((len(videos),), float(self.how))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(MODULE)
    for reward in (Writer, Mean, Listed, Failing):
        setattr(module, reward.__name__, reward)
    monkeypatch.setitem(sys.modules, MODULE, module)


def scorer_of(make_config: MakeConfig, *rewards: str) -> tuple[OrmScorer, tuple[str, ...]]:
    config = make_config(f"rewards.outcome=[{', '.join(rewards)}]", "rewards.process=null", "sampler.guidance=null")
    model = open_generator(config.model)
    pool = config.pools.orm.model_copy(update={"max_batch": 2})
    return OrmScorer(config.rewards.outcome, model, torch.device("cpu"), pool), config.rewards.optional


def reward(name: str, kind: str, rest: str = "") -> str:
    return f"{{name: {name}, type: '{MODULE}:{kind}'{rest}}}"


def latents(count: int = 3) -> np.ndarray:
    return torch.randn(count, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0)).numpy()


def test_a_reward_that_writes_into_its_videos_changes_nothing_for_the_next(make_config: MakeConfig) -> None:
    scorer, _ = scorer_of(make_config, reward("first", "Writer"), reward("next", "Mean"))
    scores = scorer.score(latents(), [PROMPT] * 3)
    np.testing.assert_array_equal(scores["first"], scores["next"])
    assert (scores["next"] > 0.01).all()


def test_scores_with_a_graph_are_taken_without_it(make_config: MakeConfig) -> None:
    scorer, _ = scorer_of(make_config, reward("mine", "Mean"))
    assert scorer.score(latents(), [PROMPT] * 3)["mine"].shape == (3,)
    assert not Batch(torch.rand(2, 1, 3, 4, 4), [PROMPT] * 2).score(Mean()).requires_grad


class Shared(Analyser[Tensor]):
    def analyse(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        found = videos.mean(dim=(1, 2, 3, 4))
        videos.zero_()
        return found


class Reader(SharedReward[Tensor]):
    analyser_class = Shared

    def read(self, analysis: Tensor, prompts: Sequence[str]) -> Tensor:
        return analysis.mul_(2)


def test_an_analysis_is_no_ones_to_change_either() -> None:
    videos = torch.rand(2, 1, 3, 4, 4)
    batch, analyser = Batch(videos.clone(), ["", ""]), Shared(Node())
    first, second = (batch.score(Reader(Node(), analyser)) for _ in range(2))
    torch.testing.assert_close(first, 2 * videos.mean(dim=(1, 2, 3, 4)))
    torch.testing.assert_close(second, first)


def test_something_else_than_a_tensor_is_an_error_of_that_reward(make_config: MakeConfig) -> None:
    scorer, _ = scorer_of(make_config, reward("mine", "Listed"))
    with pytest.raises(RewardError, match=r"'mine' failed: TypeError: score returned list, not a tensor"):
        scorer.score(latents(), [PROMPT] * 3)


@pytest.mark.parametrize("how", ["raises", "shape", "nan", "inf"])
def test_a_failing_reward_of_weight_0_is_left_out_and_the_others_stay(
    make_config: MakeConfig, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = reward("watched", "Failing", f", weight: 0, options: {{how: '{how}'}}")
    scorer, optional = scorer_of(make_config, watched, reward("mine", "Mean"))
    assert optional == ("watched",)
    answer = scorer.score(latents(), [PROMPT] * 3, optional)
    assert set(answer) == {"mine"}
    assert "left out of an answer: outcome reward 'watched'" in caplog.text
    with pytest.raises(RewardError, match="outcome reward 'watched'") as caught:
        scorer.score(latents(), [PROMPT] * 3)
    assert isinstance(caught.value, NonFiniteRewardError) == (how in ("nan", "inf"))


def test_a_reward_that_is_to_end_the_run_is_not_left_out(make_config: MakeConfig) -> None:
    watched = reward("watched", "Failing", ", weight: 0, on_failure: abort, options: {how: raises}")
    _, optional = scorer_of(make_config, watched, reward("mine", "Mean"))
    assert optional == ()


def test_of_merged_requests_only_the_one_to_blame_lacks_the_reward(make_config: MakeConfig) -> None:
    watched = reward("watched", "Failing", ", weight: 0, options: {how: raises, word: bad}")
    scorer, optional = scorer_of(make_config, watched, "{name: quality, type: sprite_quality}")
    requests = [OrmRequest(latents(2), [prompt] * 2, optional) for prompt in (PROMPT, "bad", PROMPT)]
    answers = isolated(scorer.score_requests, requests, WHAT)
    assert [isinstance(answer, dict) and set(answer) for answer in answers] == [
        {"watched", "quality"}, {"quality"}, {"watched", "quality"},
    ]  # fmt: skip
    assert OrmRequest(latents(2), [PROMPT] * 2).key != requests[0].key

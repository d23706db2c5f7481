import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.errors import ConfigError, NonFiniteRewardError, RewardError
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.hunyuan_video import HunyuanVideo
from euphonium.generators.registry import open_generator
from euphonium.generators.vae import VideoVae
from euphonium.wire.records import OrmAnswer
from reward_servers.batching import isolated
from reward_servers.orm import WHAT, OrmActor, OrmRequest, OrmScorer

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
    return OrmScorer(config.rewards.outcome, open_generator(config.model), CPU, config.pools.orm)


def custom(make_config: MakeConfig, how: str) -> RunConfig:
    spec = f"[{{name: mine, type: 'reward_server_test_rewards:BrokenReward', options: {{how: '{how}'}}}}]"
    return make_config(f"rewards.outcome={spec}")


class PickyReward:
    """A reward of a user, which fails on some prompts."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        if any("unparsable" in prompt for prompt in prompts):
            raise ValueError("what is this?")
        scores = videos.mean(dim=(1, 2, 3, 4))
        scores[["nan" in prompt for prompt in prompts]] = float("nan")
        return scores


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a module of the user's on the path."""
    import sys
    import types

    module = types.ModuleType("reward_server_test_rewards")
    module.BrokenReward = BrokenReward  # type: ignore[attr-defined]
    module.PickyReward = PickyReward  # type: ignore[attr-defined]
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
    with pytest.raises(RewardError, match=message) as caught:
        scorer.score(latents(), [PROMPT] * 3)
    assert caught.value.rewards == ("mine",)
    assert isinstance(caught.value, NonFiniteRewardError) == (how in ("nan", "inf"))
    if how != "raises":
        assert PROMPT in str(caught.value)


def test_a_bad_sample_fails_its_request_alone(make_config: MakeConfig) -> None:
    kind = "reward_server_test_rewards:PickyReward"
    config = make_config(f"rewards.outcome=[{{name: mine, type: '{kind}'}}, {{name: quality, type: sprite_quality}}]")
    scorer = scorer_of(config)
    prompts = [PROMPT, "nan", "unparsable", PROMPT]
    requests = [OrmRequest(latents(i + 1), [prompt] * (i + 1)) for i, prompt in enumerate(prompts)]
    first, nan, unparsable, last = isolated(scorer.score_requests, requests, WHAT)
    for answer, request in ((first, requests[0]), (last, requests[3])):
        assert isinstance(answer, dict)
        alone = scorer.score(request.latents, request.prompts)
        for name in ("mine", "quality"):
            np.testing.assert_allclose(answer[name], alone[name], atol=1e-5)
    assert isinstance(nan, NonFiniteRewardError)
    assert nan.rewards == ("mine",)
    assert "example of 'nan'" in str(nan)
    assert isinstance(unparsable, RewardError)
    assert "'mine' failed: ValueError: what is this?" in str(unparsable)


def test_the_actor_merges_what_comes_together(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor's class, without Ray."""
    config = make_config("pools.orm.wait_ms=500", "pools.orm.max_batch=5")
    other = "a blue fish moving up on a gray background"
    passes, score = [], OrmScorer.score_requests

    def counted(scorer: OrmScorer, merged: Sequence[OrmRequest]) -> list[OrmAnswer | RewardError]:
        passes.append(sum(request.size for request in merged))
        return score(scorer, merged)

    monkeypatch.setattr(OrmScorer, "score_requests", counted)

    async def scenario() -> None:
        actor = OrmActor(0, config)
        (one, _), (two, seconds) = await asyncio.gather(
            actor.score(latents(2), [PROMPT] * 2, 60.0), actor.score(latents(3), [other] * 3, 60.0)
        )
        assert passes == [5]
        assert (await actor.videos(latents(1))).shape == (1, 9, 32, 32, 3)
        await actor.batcher.close()
        assert seconds > 0
        for scores, prompt in ((one, PROMPT), (two, other)):
            assert set(scores) == {"icon", "motion", "quality"}
            size = len(scores["icon"])
            alone = actor.scorer.score(latents(size), [prompt] * size)
            for name, values in scores.items():
                np.testing.assert_allclose(values, alone[name], atol=1e-4)

    asyncio.run(scenario())


def test_decoding_in_tiles_and_slices_is_turned_on_in_the_vae(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vaes: list[Any] = []
    whole = VideoVae.saving_memory

    def noting(vae: VideoVae, **options: bool) -> VideoVae:
        vaes.append(whole(vae, **options).network)
        return vae

    monkeypatch.setattr(VideoVae, "saving_memory", noting)
    plain = scorer_of(make_config()).videos(latents())
    saving = scorer_of(make_config("model.vae_tiling=true", "model.vae_slicing=true")).videos(latents())
    assert [(vae.use_tiling, vae.use_slicing) for vae in vaes] == [(False, False), (True, True)]
    # These samples fit in one tile, so that nothing else changes.
    assert np.abs(plain.astype(int) - saving.astype(int)).max() <= 1


class WithoutTiles(HunyuanVideo):
    """A generator whose VAE has no memory savers."""

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        return VideoVae(object(), device, dtype)


def test_a_vae_that_cannot_decode_in_tiles_is_an_error_that_names_the_field(make_config: MakeConfig) -> None:
    config = make_config("model.vae_tiling=true").model
    generator = WithoutTiles(PipelineFolder.find(config), config)
    with pytest.raises(ConfigError, match=r"model\.vae_tiling: object cannot do that"):
        generator.load_decoder(CPU)


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

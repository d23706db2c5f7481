"""Process rewards and gradients of merged requests, without Ray."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.rewards.process import ProcessRewardModel
from reward_servers.batching import isolated
from reward_servers.prm import WHAT, PrmActor, PrmAnswer, PrmRequest, PrmScorer

CPU = torch.device("cpu")
MakeConfig = Callable[..., RunConfig]
# Of different lengths in tokens, so that merging has to pad.
PROMPTS = ["a red car moving left on a white background", "a blue fish", "a green frog moving up"]


@pytest.fixture
def requests(make_config: MakeConfig) -> list[PrmRequest]:
    worker = RolloutWorker(make_config(), CPU)
    rng = np.random.default_rng(0)
    made = []
    for prompt, sigma, size in zip(PROMPTS, (0.9, 0.35, 0.6), (3, 1, 2), strict=True):
        conditioning = {name: t.numpy() for name, t in worker.conditioning(prompt).items()}
        x = rng.standard_normal((size, 16, 5, 4, 4), dtype=np.float32)
        made.append(PrmRequest(x, sigma, conditioning, True, prompt))
    lengths = {request.conditioning["encoder_attention_mask"].shape[1] for request in made}
    assert len(lengths) == 3
    return made


def autograd(config: RunConfig, request: PrmRequest) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and gradient by plain autograd, of this request alone."""
    assert config.rewards.process is not None
    model = ProcessRewardModel.load(Path(config.rewards.process.path), config.model)
    x = torch.tensor(request.x, requires_grad=True)
    conditioning = {n: torch.tensor(a).expand(len(x), *a.shape[1:]) for n, a in request.conditioning.items()}
    rewards = model(x, torch.full((len(x),), request.sigma), conditioning)
    rewards.sum().backward()
    assert x.grad is not None
    return rewards.detach().numpy(), x.grad.numpy()


def assert_equal_to_autograd(config: RunConfig, request: PrmRequest, answer: PrmAnswer | RewardError) -> None:
    assert not isinstance(answer, RewardError)
    rewards, gradient = answer
    wanted_rewards, wanted_gradient = autograd(config, request)
    assert np.abs(wanted_gradient).max() > 1e-4
    np.testing.assert_allclose(rewards, wanted_rewards, atol=1e-6, rtol=0)
    assert gradient is not None
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("max_batch", [1, 4, 16])
def test_merged_gradients_equal_autograd_of_each_request(
    make_config: MakeConfig, requests: list[PrmRequest], max_batch: int
) -> None:
    """Groups of different prompts, lengths, noise levels and sizes, cut in passes of any size."""
    config = make_config(f"pools.prm.max_batch={max_batch}")
    assert len({request.key for request in requests}) == 1
    for request, answer in zip(requests, PrmScorer(config, CPU).score(requests), strict=True):
        assert_equal_to_autograd(config, request, answer)


def test_only_requests_that_padding_leaves_alone_are_merged(requests: list[PrmRequest]) -> None:
    one, other, _ = requests

    def unmasked(request: PrmRequest) -> PrmRequest:
        conditioning = {n: a for n, a in request.conditioning.items() if not n.endswith("mask")}
        return PrmRequest(request.x, request.sigma, conditioning, True)

    assert one.key == other.key
    assert unmasked(one).key != unmasked(other).key
    assert unmasked(one).key == unmasked(one).key
    assert one.key != PrmRequest(one.x, one.sigma, one.conditioning, False).key
    assert one.key != PrmRequest(one.x[..., :2], one.sigma, one.conditioning, True).key


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_fails_its_request_alone(
    make_config: MakeConfig, requests: list[PrmRequest], value: float
) -> None:
    config = make_config()
    requests[1].x[0, 0, 0, 0, 0] = value
    answers = isolated(PrmScorer(config, CPU).score, requests, WHAT)
    assert isinstance(answers[1], NonFiniteRewardError)
    assert "'a blue fish'" in str(answers[1])
    assert answers[1].rewards == ("process",)
    for i in (0, 2):
        assert_equal_to_autograd(config, requests[i], answers[i])


def test_a_gradient_that_is_not_finite_is_an_error_too(
    make_config: MakeConfig, requests: list[PrmRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = PrmScorer(make_config(), CPU)
    whole = scorer.model.reward_and_gradient

    def spoilt(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rewards, gradient = whole(*arguments)
        gradient[3] = float("inf")
        return rewards, gradient

    monkeypatch.setattr(scorer.model, "reward_and_gradient", spoilt)
    first, second, third = scorer.score(requests)
    assert isinstance(first, tuple)
    assert isinstance(third, tuple)
    assert isinstance(second, NonFiniteRewardError)
    assert "gradient that is not finite for 'a blue fish' at sigma 0.350" in str(second)


def test_a_request_of_a_wrong_shape_fails_with_its_prompt(make_config: MakeConfig, requests: list[PrmRequest]) -> None:
    conditioning = {**requests[1].conditioning}
    conditioning["pooled_projections"] = conditioning["pooled_projections"][:, :3]
    bad = PrmRequest(requests[1].x, 0.5, conditioning, True, "a blue fish")
    assert bad.key != requests[0].key
    (answer,) = isolated(PrmScorer(make_config(), CPU).score, [bad], WHAT)
    assert isinstance(answer, RewardError)
    assert "the process reward model failed on 'a blue fish': RuntimeError" in str(answer)


def test_the_actor_merges_what_comes_together(
    make_config: MakeConfig, requests: list[PrmRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor's class, without Ray."""
    config = make_config("pools.prm.wait_ms=500", "pools.prm.max_batch=6")
    passes, score = [], PrmScorer.score

    def counted(scorer: PrmScorer, merged: Sequence[PrmRequest]) -> list[PrmAnswer | RewardError]:
        passes.append(sum(request.size for request in merged))
        return score(scorer, merged)

    monkeypatch.setattr(PrmScorer, "score", counted)

    async def scenario() -> list[PrmAnswer]:
        actor = PrmActor(0, config)
        calls = [actor.reward_and_gradient(r.x, r.sigma, r.conditioning, True, r.prompt, 60.0) for r in requests]
        answers = await asyncio.gather(*calls)
        await actor.batcher.close()
        return answers

    answers = asyncio.run(scenario())
    assert passes == [6]
    for request, answer in zip(requests, answers, strict=True):
        assert_equal_to_autograd(config, request, answer)

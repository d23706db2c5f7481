"""Rewards from the process reward model and gradients from SPSA, where a recipe has both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actors import sources
from actors.rollout import RolloutWorker
from actors.sampler import Rewarded
from actors.sources import RewardSources
from euphonium.config import RunConfig
from euphonium.wire.later import Later
from euphonium.wire.records import GroupTask
from euphonium.wire.roles import RolloutContext

CPU = torch.device("cpu")
TASK = GroupTask(group_id=0, prompt="a red car moving left on a white background", seed=3, iteration=0)
SPSA = "sampler.guidance={source: spsa, scale: 0.2, window: [1, 3]}"


class Scripted:
    """A source whose rewards tell the state apart, and which notes for what it was asked."""

    def __init__(self, offset: float) -> None:
        self.offset = offset
        self.asked: list[tuple[int, bool]] = []

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        self.asked.append((k, with_gradient))
        rewards = torch.full((len(x),), self.offset + k)
        return Later(lambda: (rewards, torch.full_like(x, self.offset) if with_gradient else None))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> tuple[Scripted, Scripted]:
    """The process reward model and SPSA, in place of their servers."""
    prm, spsa = Scripted(100.0), Scripted(-5.0)
    monkeypatch.setattr(sources, "PrmClient", lambda *_: prm)
    monkeypatch.setattr(sources, "SpsaSource", lambda *_, **__: spsa)
    monkeypatch.setattr(sources, "node_id", lambda: "here")
    return prm, spsa


def test_gradients_come_from_spsa_and_rewards_from_the_process_reward_model(
    scripted: tuple[Scripted, Scripted], make_config: Callable[..., RunConfig]
) -> None:
    prm, spsa = scripted
    config = make_config(SPSA)
    make_source = RewardSources(config, 0).of_group(TASK, RolloutContext(version=0, history=0))
    assert make_source is not None
    info, _, _ = RolloutWorker(config, CPU).generate(TASK, make_source)
    assert spsa.asked == [(1, True), (2, True)]
    assert [k for k, _ in prm.asked] == [0, 1, 2, 3]
    assert not any(with_gradient for _, with_gradient in prm.asked)
    assert info.process_rewards is not None
    assert info.process_rewards.tolist() == [[100.0, 101.0, 102.0, 103.0]] * 3


def test_the_gradient_of_spsa_reaches_the_samples(
    scripted: tuple[Scripted, Scripted], make_config: Callable[..., RunConfig]
) -> None:
    _, spsa = scripted
    config = make_config(SPSA)
    worker, sources_of = RolloutWorker(config, CPU), RewardSources(config, 0)
    drawn = []
    for strength in (-5.0, 5.0):
        spsa.offset = strength
        drawn.append(worker.generate(TASK, sources_of.of_group(TASK, RolloutContext(version=0, history=0)))[1])
    assert abs(drawn[0] - drawn[1]).max() > 0.1


def test_spsa_alone_gives_both_and_no_guidance_leaves_the_model(
    scripted: tuple[Scripted, Scripted], make_config: Callable[..., RunConfig]
) -> None:
    prm, spsa = scripted
    context = RolloutContext(version=0, history=0)
    for overrides, expected in (
        ((SPSA, "rewards.process=null"), spsa),
        (("sampler.guidance=null",), prm),
        (("sampler.guidance={scale: 0.2}",), prm),
    ):
        make_source = RewardSources(make_config(*overrides), 0).of_group(TASK, context)
        assert make_source is not None
        source = make_source({}, None, None)  # type: ignore[arg-type]
        before = len(expected.asked)
        source.submit(1, torch.zeros(2, 3), with_gradient=True)
        assert len(expected.asked) == before + 1
    nothing = make_config("sampler.guidance=null", "rewards.process=null")
    assert RewardSources(nothing, 0).of_group(TASK, context) is None

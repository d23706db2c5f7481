"""Groups that are drawn in parts and put together equal those that are drawn whole, in every array."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors import sources
from actors.rollout import RolloutWorker
from actors.sampler import Rewarded
from actors.sources import RewardSources
from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.wire.later import Later
from euphonium.wire.records import GroupInfo, GroupPayload, GroupTask
from euphonium.wire.roles import RolloutContext

Group = tuple[GroupInfo, np.ndarray, GroupPayload]
Draw = Callable[..., tuple[Group, list[Group]]]

CPU = torch.device("cpu")
SIZE = 4
TASK = GroupTask(group_id=5, prompt="a red car moving left on a white background", seed=11, iteration=1, strength=1.5)
HALVES, UNEVEN, ALONE = (0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)

PLAIN = ("sampler.guidance=null", "rewards.process=null", "advantage.mode=outcome")
APART = "sampler.shared_noise=false"
HALF = "objective.timestep_fraction=0.5"
NOISED = (
    *PLAIN, APART, HALF, "sampler.law=ode", "sampler.eta=null", "objective.kl.anchor=fixed",
    "pools.learner.rows_per_micro_batch=4",
)  # fmt: skip
MIXED = "sampler.guidance={scale: 5.0, window: [1, 3], strengths: [0.0, 1.0]}"
LATE = "sampler.sde_window=[2, 4]"
SPSA = "sampler.guidance={source: spsa, scale: 0.2, window: [1, 3], spsa: {perturbations: 2}}"
KINDS: dict[str, tuple[str, ...]] = {
    "dance": PLAIN,
    "dance, noise of each": (*PLAIN, APART),
    "flow_grpo": (*PLAIN, "sampler.law=flow_grpo"),
    "sage": (*PLAIN, "sampler.law=sage"),
    "cps": (*PLAIN, "sampler.law=cps"),
    "some steps": (*PLAIN, HALF),
    "some steps, noise of each": (*PLAIN, HALF, APART),
    "trained range": (*PLAIN, "objective.trained_steps=[1, 3]"),
    "window": (*PLAIN, LATE),
    "window of the iteration": (*PLAIN, "sampler.sde_window={kind: sliding, size: 2, allowed: [0, 4]}"),
    "window of the group": (*PLAIN, "sampler.sde_window={kind: group, size: 1, allowed: [0, 3]}"),
    "guided": ("sampler.guidance.scale=5.0",),
    "guided mean": ("sampler.guidance.scale=5.0", "objective.kind=standard"),
    "progress": ("rewards.process.credit=progress", "rewards.process.steps=guided"),
    "state that follows": ("rewards.process.credit=next_state", "rewards.process.outcome_weight=0.5"),
    "strengths": (MIXED,),
    "strengths, parted by guidance": (MIXED, LATE),
    "spsa with process rewards": (SPSA,),
    "nft": (*NOISED, "objective.kind=nft"),
    "dpo": (*NOISED, "objective.kind=dpo", "advantage.best_of=1"),
}
SHARE_NO_STATE = {
    "dance, noise of each", "some steps, noise of each", "trained range", "strengths, parted by guidance", "nft", "dpo",
}  # fmt: skip


class OneByOne:
    """A source whose answer for a state does not depend on the others, to the last bit."""

    def __init__(self, source: LocalRewards) -> None:
        self._source = source

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        answers = [self._source.submit(k, state[None], with_gradient=with_gradient).result() for state in x]
        gradients = [gradient for _, gradient in answers if gradient is not None]
        rewards = torch.cat([reward for reward, _ in answers])
        return Later(lambda: (rewards, torch.cat(gradients) if with_gradient else None))


@pytest.fixture
def draw(make_config: Callable[..., RunConfig], tiny_prm: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draws a group with some overrides whole, and in parts that begin and end at some samples."""
    monkeypatch.setattr(sources, "node_id", lambda: "here")

    def drawn(overrides: Sequence[str], *cuts: Sequence[int]) -> tuple[Group, list[Group]]:
        config = make_config(f"rollout.group_size={SIZE}", *overrides)
        worker, of_run = RolloutWorker(config, CPU), RewardSources(config, 0)
        prm = ProcessRewardModel.load(tiny_prm, config.model)
        monkeypatch.setattr(
            sources, "PrmClient", lambda _, prompt, table, __: OneByOne(LocalRewards(prm, prompt, table.sigmas))
        )
        monkeypatch.setattr(of_run, "_outcome_score", lambda _: lambda x: Later(lambda: x.flatten(1).square().sum(1)))

        def group(task: GroupTask) -> Group:
            return worker.generate(task, of_run.of_group(task, RolloutContext(version=0, history=0)))

        def in_parts(cut: Sequence[int]) -> Group:
            parts = [group(dataclasses.replace(TASK, members=members)) for members in itertools.pairwise(cut)]
            assert [len(latents) for _, latents, _ in parts] == np.diff(cut).tolist()
            infos, latents, payloads = zip(*parts, strict=True)
            return worker.merge(infos, latents, payloads)

        return group(TASK), [in_parts(cut) for cut in cuts]

    return drawn


def assert_equal(whole: Group, merged: Group, tolerance: float) -> None:
    def same(one: np.ndarray | None, other: np.ndarray | None, name: str) -> None:
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert one.dtype == other.dtype, name
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=name)

    (info, latents, payload), (merged_info, merged_latents, merged_payload) = whole, merged
    same(latents, merged_latents, "latents")
    for field in dataclasses.fields(GroupPayload):
        if field.name != "conditioning":
            same(getattr(payload, field.name), getattr(merged_payload, field.name), field.name)
    assert payload.conditioning.keys() == merged_payload.conditioning.keys()
    for name in ("rows", "process_rewards", "final_rewards"):
        same(getattr(info, name), getattr(merged_info, name), name)
    for name in ("task", "policy_version", "fingerprint", "payload_bytes"):
        assert getattr(info, name) == getattr(merged_info, name), name
    assert info.seconds.keys() == merged_info.seconds.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_whose_passes_are_those_of_the_group_are_the_group_to_the_last_bit(draw: Draw, kind: str) -> None:
    whole, parts = draw(("rollout.samples_per_pass=1", *KINDS[kind]), UNEVEN, ALONE)
    for merged in parts:
        assert_equal(whole, merged, 0.0)
    (_, latents, payload) = whole
    assert not np.array_equal(latents[1], latents[2]), "samples that are all alike would show nothing"
    first = payload.rows[payload.steps == payload.steps.min()]
    assert (len(set(first.tolist())) == 1) == (kind not in SHARE_NO_STATE)


@pytest.mark.parametrize("kind", ["dance", "strengths", "guided mean", "dpo"])
def test_other_passes_change_no_more_than_rounding(draw: Draw, kind: str) -> None:
    whole, parts = draw(KINDS[kind], HALVES, UNEVEN)
    for merged in parts:
        assert_equal(whole, merged, 2e-5)


def test_passes_that_end_where_parts_do_are_the_same(draw: Draw) -> None:
    whole, (merged,) = draw(("rollout.samples_per_pass=2", *KINDS["strengths"]), HALVES)
    assert_equal(whole, merged, 0.0)


def test_parts_of_different_policies_are_no_group(make_config: Callable[..., RunConfig]) -> None:
    worker = RolloutWorker(make_config(f"rollout.group_size={SIZE}", *PLAIN), CPU)
    parts = []
    for version, members in enumerate([(0, 2), (2, 4)], start=3):
        worker.policy_version = version
        parts.append(worker.generate(dataclasses.replace(TASK, members=members), None))
    infos, latents, payloads = zip(*parts, strict=True)
    with pytest.raises(TrainingError, match=r"group 5 were drawn by policy versions \[3, 4\]"):
        worker.merge(infos, latents, payloads)


def test_seconds_of_parts_are_those_of_all_actors(make_config: Callable[..., RunConfig]) -> None:
    worker = RolloutWorker(make_config(f"rollout.group_size={SIZE}", *PLAIN), CPU)
    drawn = [worker.generate(dataclasses.replace(TASK, members=part), None) for part in ((0, 1), (1, 4))]
    seconds = {"total": (2.0, 3.0), "weights": (0.5, 0.25)}
    parts = [
        dataclasses.replace(info, seconds={name: each[i] for name, each in seconds.items()}, reused=float(i))
        for i, (info, _, _) in enumerate(drawn)
    ]
    info, _, _ = worker.merge(parts, [latents for _, latents, _ in drawn], [payload for *_, payload in drawn])
    assert info.seconds == {"total": 5.0, "weights": 0.5}, "weights are waited for at the same time"
    assert info.reused == 0.5

"""Which groups the learner group begins with, and how a beginning ends, without Ray."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from euphonium.config import RunConfig
from euphonium.errors import LostActorError
from euphonium.wire.records import Begin, Save, UpdateReport
from orchestrator.groups.batches import BatchSource
from orchestrator.groups.credit import assign_credit
from orchestrator.groups.guidance_control import GuidanceControl
from orchestrator.groups.prompts import PromptStream
from orchestrator.learning.link import LearnerRestartedError
from orchestrator.learning.stream import Stream
from orchestrator.report.statistics import RewardFailures
from orchestrator.state.checkpoints import RunState
from orchestrator.state.position import Position
from tests.orchestrator.groups.scored import Rollouts
from tests.orchestrator.learning.in_process import Setting, play, turn_over

FOUR = ("rollout.prompts_per_iteration=4", "rewards.max_dropped_fraction=0.5")


class Scene:
    """A stream of four groups an iteration, and a learner group that carries out an order when it is told to."""

    def __init__(self, config: RunConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.rollouts: Any = Rollouts(config)
        self.rollouts.held_back = {0, 1, 2, 3}
        position = Position(RunState(iteration=0, next_group=0, world_size=1))
        self.source = BatchSource(
            config, self.rollouts, position, PromptStream(["a", "b", "c"], config.seed),
            RewardFailures(config.rewards), GuidanceControl(config.sampler.guidance, 0),
        )  # fmt: skip
        self.stream = Stream(config, self.source, setting.link, position)

    async def done(self, *groups: int) -> None:
        """These groups are drawn."""
        self.rollouts.held_back -= set(groups)
        for _ in range(5):
            await turn_over()

    async def lease(self) -> Begin:
        order: Begin = await self.setting.mailbox.lease.remote(0, "a")
        return order

    async def report(self, order: Begin) -> None:
        metrics = {"time/update_s": 2.0, "time/fetch_s": 0.5, "policy/loss": 9.0}
        await self.setting.mailbox.acknowledge.remote(0, "a", UpdateReport(version=order.version, metrics=metrics))
        await turn_over()


MakeScene = Callable[..., Scene]


@pytest.fixture
def make_scene(make_config: Callable[..., RunConfig], make_setting: Callable[..., Setting]) -> MakeScene:
    return lambda *overrides: Scene(make_config(*FOUR, *overrides), make_setting(*FOUR, *overrides))


def numbers(order: Begin) -> list[int]:
    return [group.info.task.group_id for group in order.groups]


def test_groups_begin_in_their_order_and_the_last_waits_for_the_update(make_scene: MakeScene) -> None:
    async def scene() -> None:
        it = make_scene()
        await it.setting.up()
        batch = asyncio.ensure_future(it.stream.next())
        await it.done(1)
        leased = asyncio.ensure_future(it.lease())
        await turn_over()
        assert not leased.done(), "group 1 does not begin before group 0"
        await it.done(0)
        first = await leased
        assert (numbers(first), first.expected, first.version) == ([0, 1], 4, 0)
        assert first.payloads == ("payload of group 0", "payload of group 1")
        await it.done(2)
        await it.report(first)
        second = await it.lease()
        assert numbers(second) == [0, 1, 2], "an order says all that is there"
        await it.done(3)
        assert not batch.done(), "an order is not cut in two"
        await it.report(second)
        whole, _ = assign_credit(it.config, await batch)
        for begun, group in zip(second.groups, whole, strict=False):
            assert (begun.advantages == group.advantages).all()
        report = it.stream.whole(UpdateReport(version=1, metrics={"time/update_s": 1.0, "policy/loss": 0.5}))
        assert report.metrics == {
            "time/update_s": 5.0, "time/fetch_s": 1.0, "time/streamed_s": 4.0, "policy/loss": 0.5,
        }  # fmt: skip

    play(scene())


def test_a_group_that_is_lost_is_counted_on_no_longer(make_scene: MakeScene) -> None:
    async def scene() -> None:
        it = make_scene()
        await it.setting.up()
        it.rollouts.errors = {1: LostActorError("died")}
        batch = asyncio.ensure_future(it.stream.next())
        await it.done(0)
        first = await it.lease()
        assert (numbers(first), first.expected) == ([0], 4)
        await it.done(1, 2)
        await it.report(first)
        second = await it.lease()
        assert (numbers(second), second.expected) == ([0, 2], 3)
        await it.report(second)
        await it.done(3)
        assert [group.info.task.group_id for group in (await batch).groups] == [0, 2, 3]
        assert it.source.beginning()[1] == 3

    play(scene())


def test_whoever_gives_up_the_wait_leaves_no_order_half_done(make_scene: MakeScene) -> None:
    async def scene() -> None:
        it = make_scene()
        link = await it.setting.up()
        batch = asyncio.ensure_future(it.stream.next())
        await it.done(0)
        order = await it.lease()
        batch.cancel()
        await turn_over()
        assert not batch.done()
        await it.report(order)
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert sorted(it.rollouts.cancelled) == [1, 2, 3]
        save = Save(version=0, folder="step_0")
        taken, _ = await asyncio.gather(it.setting.work(), link.carry_out(save))
        assert taken is save

    play(scene())


def test_a_learner_group_that_starts_anew_ends_the_drawing_for_the_weights_that_it_had(make_scene: MakeScene) -> None:
    async def scene() -> None:
        it = make_scene()
        await it.setting.up()
        batch = asyncio.ensure_future(it.stream.next())
        await it.done(0)
        await it.lease()
        await it.setting.join("b")
        with pytest.raises(LearnerRestartedError):
            await batch
        assert sorted(it.rollouts.cancelled) == [1, 2, 3]

    play(scene())


@pytest.mark.parametrize("override", ["rollout.stream=false", "advantage.scope=global", "rollout.max_staleness=1"])
def test_some_recipes_wait_for_the_whole_batch(make_scene: MakeScene, override: str) -> None:
    async def scene() -> None:
        it = make_scene(override)
        await it.setting.up()
        batch = asyncio.ensure_future(it.stream.next())
        leased = asyncio.ensure_future(it.lease())
        for group in range(4):
            await it.done(group)
        assert len((await batch).groups) == 4
        assert not leased.done()
        leased.cancel()

    play(scene())

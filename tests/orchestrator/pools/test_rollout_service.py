"""Rollouts whose actor or weights are lost, with actors that answer from a script in this process."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, RewardError, TrainingError, WeightsMissingError
from euphonium.wire.records import GroupTask
from euphonium.wire.roles import RolloutContext
from orchestrator.pools import rollout_service
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.pools.roster import Member
from orchestrator.pools.run_pools import ActorFactories, RunPools
from orchestrator.report.tracking import Progress
from orchestrator.state.checkpoints import RunState
from orchestrator.state.position import Position

MakeConfig = Callable[..., RunConfig]
TASK = GroupTask(group_id=3, prompt="a prompt", seed=1)


async def answer(value: Any) -> Any:
    # No other process answers before the caller has gone on.
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return await value if asyncio.iscoroutine(value) else value


class Method:
    """Stands where Ray's handle has a remote method."""

    def __init__(self, script: Iterator[Any], asked: list[tuple[Any, ...]], results: int = 1) -> None:
        self._script, self._asked, self._results = script, asked, results

    def options(self, num_returns: int) -> "Method":
        return Method(self._script, self._asked, num_returns)

    def remote(self, *arguments: Any) -> Any:
        self._asked.append(arguments)
        first = answer(next(self._script))
        return first if self._results == 1 else (first, *["a reference"] * (self._results - 1))


class Handle:
    """A rollout actor's handle whose calls answer what a script says."""

    def __init__(self, script: Sequence[Any]) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.generate = self.merge = self.evaluate = self.sleep = Method(iter(script), self.asked)


class Setting:
    """A service with one rollout actor for each script."""

    def __init__(self, config: RunConfig, *scripts: Sequence[Any]) -> None:
        self.pools = RunPools(config, ActorFactories(orm=never, rollout=never), Progress(1, 0))
        self.handles = [Handle(script) for script in scripts]
        self.position = Position(RunState(iteration=5, next_group=0, world_size=1), history=2)
        self.published = 0
        self.service = RolloutService(config, self.pools, self.position, self.republish)

    async def republish(self) -> None:
        self.published += 1

    async def open(self) -> RolloutService:
        for i, handle in enumerate(self.handles):
            member = Member(f"rollout-{i}", handle)
            self.pools.rollout.roster.add(member)
            await self.pools.rollout.roster.join(member)
        return self.service


def never(index: int, options: Any) -> Any:
    raise AssertionError("no actor is started")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_service, "LONGEST_PAUSE_S", 0.0)


def test_a_group_whose_actor_is_lost_is_drawn_by_another_one(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    setting = Setting(make_config(), [LostActorError("rollout-0 died")], ["info"])

    async def draw() -> None:
        service = await setting.open()
        assert await service.draw(TASK) == ("info", "a reference", "a reference")

    with caplog.at_level(logging.WARNING):
        asyncio.run(draw())
    assert [record.getMessage() for record in caplog.records] == ["group 3 (a prompt): trying again: rollout-0 died"]
    assert [member.name for member in setting.pools.rollout.roster.present] == ["rollout-1"]
    assert setting.handles[1].asked == [(TASK, RolloutContext(version=5, history=2))]
    assert setting.published == 0
    assert setting.pools.rollout.roster.working == []


def test_a_part_whose_actor_is_lost_is_drawn_by_another_one_and_the_others_stay(make_config: MakeConfig) -> None:
    setting = Setting(make_config(), ["samples 0-1", "sample 2", "info"], [LostActorError("rollout-1 died")])

    async def draw() -> None:
        service = await setting.open()
        assert await service.draw(TASK, [(0, 2), (2, 3)]) == ("info", "a reference", "a reference")

    asyncio.run(draw())
    context = RolloutContext(version=5, history=2)
    first, second = (dataclasses.replace(TASK, members=members) for members in [(0, 2), (2, 3)])
    assert setting.handles[1].asked == [(second, context)]
    merged = (("samples 0-1", "sample 2"), *["a reference"] * 4)
    assert setting.handles[0].asked == [(first, context), (second, context), merged]
    assert setting.pools.rollout.roster.working == []


def test_parts_that_are_put_together_by_an_actor_that_is_lost_are_not_drawn_again(make_config: MakeConfig) -> None:
    setting = Setting(make_config(), ["one", LostActorError("rollout-0 died")], ["other", "info"])

    async def draw() -> None:
        service = await setting.open()
        assert (await service.draw(TASK, [(0, 2), (2, 3)]))[0] == "info"

    asyncio.run(draw())
    assert setting.handles[0].asked[1] == setting.handles[1].asked[1] == (("one", "other"), *["a reference"] * 4)


def test_a_part_that_fails_ends_the_group_once_the_other_actors_are_idle(make_config: MakeConfig) -> None:
    late: asyncio.Event = asyncio.Event()
    setting = Setting(make_config(), [RewardError("no server", ["process"])], [late.wait()])

    async def draw() -> None:
        service = await setting.open()
        drawing = asyncio.ensure_future(service.draw(TASK, [(0, 2), (2, 3)]))
        for _ in range(30):
            await asyncio.sleep(0)
        assert [member.name for member in setting.pools.rollout.roster.working] == ["rollout-1"]
        assert not drawing.done()
        late.set()
        with pytest.raises(RewardError, match="no server"):
            await drawing

    asyncio.run(draw())
    assert [len(handle.asked) for handle in setting.handles] == [1, 1], "nothing is put together"


def test_missing_weights_are_published_again_and_their_actor_goes_on(make_config: MakeConfig) -> None:
    setting = Setting(make_config(), [WeightsMissingError("version 5"), np.ones(2)])

    async def sample() -> None:
        service = await setting.open()
        assert np.array_equal(await service.samples(["a prompt"], [7], "average"), np.ones(2))

    asyncio.run(sample())
    assert setting.published == 1
    context = RolloutContext(version=5, history=2, kind="average")
    assert setting.handles[0].asked == [(["a prompt"], [7], context)] * 2
    assert setting.service.rollout_actors == 1


def test_actors_go_to_sleep_where_the_recipe_wants_it_and_one_that_is_lost_over_it_is_no_error(
    make_config: MakeConfig,
) -> None:
    async def sleep(setting: Setting) -> list[str]:
        service = await setting.open()
        await service.sleep()
        return [member.name for member in setting.pools.rollout.roster.present]

    setting = Setting(make_config("pools.rollout.sleep=true"), [None], [LostActorError("rollout-1 died")])
    assert asyncio.run(sleep(setting)) == ["rollout-0"]
    assert [handle.asked for handle in setting.handles] == [[()], [()]]
    awake = Setting(make_config(), [], [])
    assert asyncio.run(sleep(awake)) == ["rollout-0", "rollout-1"]
    assert [handle.asked for handle in awake.handles] == [[], []]


def test_after_the_last_attempt_the_last_error_is_raised(make_config: MakeConfig) -> None:
    errors = [LostActorError("first"), LostActorError("second")]
    setting = Setting(make_config("rewards.attempts=2"), [errors[0]], [errors[1]], ["never asked"])

    async def draw() -> None:
        service = await setting.open()
        with pytest.raises(LostActorError, match="second"):
            await service.draw(TASK)

    asyncio.run(draw())
    assert [len(handle.asked) for handle in setting.handles] == [1, 1, 0]


def test_other_errors_are_not_tried_again(make_config: MakeConfig) -> None:
    setting = Setting(make_config(), [TrainingError("a latent that is not finite"), "never asked"])

    async def draw() -> None:
        service = await setting.open()
        with pytest.raises(TrainingError, match="not finite"):
            await service.draw(TASK)

    asyncio.run(draw())
    assert len(setting.handles[0].asked) == 1
    assert setting.service.rollout_actors == 1


def test_evaluation_goes_before_groups_and_groups_in_their_order(make_config: MakeConfig) -> None:
    setting = Setting(make_config(), ["first", "evaluation", "second", "third"])

    async def work() -> list[tuple[str, Any]]:
        service, done = await setting.open(), []

        async def note(name: str, asked: Any) -> None:
            await asked
            done.append(name)

        async with setting.pools.rollout.exclusive(0):
            tasks = [
                asyncio.ensure_future(note(f"group {i}", service.draw(GroupTask(group_id=i, prompt="", seed=0))))
                for i in (8, 6, 7)
            ]
            await asyncio.sleep(0)
            tasks.append(asyncio.ensure_future(note("evaluation", service.samples([""], [0], "policy"))))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return done

    assert asyncio.run(work()) == ["evaluation", "group 6", "group 7", "group 8"]

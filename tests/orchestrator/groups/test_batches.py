"""Batches without Ray: which groups they are of, how far ahead they are begun, and what is lost of them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, RewardError, TrainingError
from orchestrator.groups.batches import BatchSource
from orchestrator.groups.guidance_control import GuidanceControl
from orchestrator.groups.prompts import PromptStream
from orchestrator.report.statistics import RewardFailures
from orchestrator.state.checkpoints import RunState
from orchestrator.state.position import Position
from tests.orchestrator.groups.scored import Rollouts, scores_of

MakeConfig = Callable[..., RunConfig]


class Setting:
    """A source of batches at some position."""

    def __init__(self, config: RunConfig, state: RunState | None = None) -> None:
        self.position = Position(state or RunState(iteration=0, next_group=0, world_size=1))
        self.rollouts: Any = Rollouts(config)
        self.failures = RewardFailures(config.rewards)
        stream = PromptStream(["a", "b", "c"], config.seed)
        self.guidance = GuidanceControl(config.sampler.guidance, config.rollout.max_staleness)
        self.source = BatchSource(config, self.rollouts, self.position, stream, self.failures, self.guidance)

    async def train(self) -> list[int]:
        """Takes the next batch and moves the position past it; the ordinals of its groups."""
        batch = await self.source.next()
        done = self.position.iteration + 1
        self.position.state = RunState(iteration=done, next_group=batch.next_group, world_size=1)
        await self.source.trained(batch)
        return [group.info.task.group_id for group in batch.groups]


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


async def turn_over() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


def test_batches_follow_one_another_from_where_the_run_stands(make_config: MakeConfig) -> None:
    config = make_config("iterations=6", "rewards.deadline_s=7")

    async def scene() -> None:
        setting = Setting(config, RunState(iteration=4, next_group=11, world_size=1))
        batch = await setting.source.next()
        assert [group.info.task.iteration for group in batch.groups] == [4, 4]
        assert [group.scores.keys() for group in batch.groups] == [scores_of(config, 0).keys()] * 2
        assert (batch.dropped, batch.next_group) == (0, 13)
        assert await setting.train() == [11, 12]
        assert await setting.train() == [13, 14]
        assert setting.rollouts.drawn == [11, 12, 13, 14], "each group is drawn once"
        assert setting.rollouts.deadlines == {7.0}

    play(scene())


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_drawing_runs_ahead_as_far_as_the_bound_and_the_end_of_the_run_allow(
    make_config: MakeConfig, staleness: int
) -> None:
    async def scene() -> None:
        setting = Setting(make_config("iterations=4", f"rollout.max_staleness={staleness}"))
        for done in range(4):
            setting.source.draw_ahead()
            await turn_over()
            assert sorted(setting.rollouts.drawn) == list(range(2 * min(4, done + 1 + staleness)))
            assert await setting.train() == [2 * done, 2 * done + 1]
        assert setting.source.buffer.held().groups == 0

    play(scene())


def test_groups_come_in_the_order_of_their_ordinals_whoever_is_done_first(make_config: MakeConfig) -> None:
    async def scene() -> None:
        setting = Setting(make_config("rollout.prompts_per_iteration=3"))
        setting.rollouts.held_back = {0}
        waiting = asyncio.ensure_future(setting.source.next())
        await turn_over()
        assert not waiting.done()
        setting.rollouts.held_back.clear()
        assert [group.info.task.group_id for group in (await waiting).groups] == [0, 1, 2]

    play(scene())


def test_the_groups_of_an_incomplete_wave_are_drawn_in_parts(make_config: MakeConfig) -> None:
    async def scene(*overrides: str) -> dict[int, int]:
        three = ("rollout.prompts_per_iteration=3", "pools.rollout.num_actors=2")
        setting = Setting(make_config(*three, *overrides), RunState(iteration=1, next_group=10, world_size=1))
        await setting.train()
        parts: dict[int, int] = setting.rollouts.parts
        return parts

    # Two samples, and the third.
    assert asyncio.run(scene("rollout.split_tail=true")) == {10: 0, 11: 0, 12: 2}
    assert asyncio.run(scene()) == {10: 0, 11: 0, 12: 0}


@pytest.mark.parametrize("error", [RewardError("no answer", ["icon"]), LostActorError("died")])
def test_a_group_that_is_lost_is_left_out_and_counted(make_config: MakeConfig, error: Exception) -> None:
    async def scene() -> None:
        setting = Setting(make_config("rewards.max_dropped_fraction=0.5"))
        setting.rollouts.errors = {1: error}
        batch = await setting.source.next()
        assert [group.info.task.group_id for group in batch.groups] == [0]
        assert (batch.dropped, batch.next_group) == (1, 2)
        assert setting.source.buffer.held().groups == 1
        assert setting.failures.take()["rewards/failures/icon"] == isinstance(error, RewardError)

    play(scene())


@pytest.mark.parametrize(("fraction", "lost"), [(0.25, {0}), (1.0, {0, 1})])
def test_too_many_lost_groups_end_the_run_with_the_reason(
    make_config: MakeConfig, fraction: float, lost: set[int]
) -> None:
    async def scene() -> None:
        setting = Setting(make_config(f"rewards.max_dropped_fraction={fraction}"))
        setting.rollouts.errors = dict.fromkeys(lost, RewardError("the judge is down", ["icon"]))
        with pytest.raises(RewardError, match=f"{len(lost)} of 2 groups.*max_dropped_fraction.*the judge is down"):
            await setting.source.next()

    play(scene())


def test_an_error_that_no_other_group_would_escape_ends_the_others(make_config: MakeConfig) -> None:
    async def scene() -> None:
        setting = Setting(make_config())
        setting.rollouts.errors = {1: TrainingError("a latent that is not finite")}
        setting.rollouts.held_back = {0}
        with pytest.raises(TrainingError, match="not finite"):
            await setting.source.next()
        await turn_over()
        assert setting.rollouts.cancelled == [0]

    play(scene())


def test_what_was_drawn_ahead_is_given_up_and_drawn_again_from_where_the_run_then_stands(
    make_config: MakeConfig,
) -> None:
    async def scene() -> None:
        setting = Setting(make_config("iterations=4", "rollout.max_staleness=1"))
        setting.rollouts.held_back = {2, 3, 4, 5}
        await setting.train()
        setting.source.draw_ahead()
        await turn_over()
        await setting.source.forget()
        assert sorted(setting.rollouts.cancelled) == [2, 3, 4, 5]
        assert setting.source.buffer.held().groups == 0
        setting.position.state = RunState(iteration=0, next_group=0, world_size=1)
        setting.rollouts.held_back.clear()
        setting.rollouts.drawn.clear()
        assert await setting.train() == [0, 1]
        assert setting.rollouts.drawn[:2] == [0, 1]

    play(scene())

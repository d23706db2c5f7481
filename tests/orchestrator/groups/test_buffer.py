"""The trajectory buffer without Ray: who finds room, what is held, and when it is let go."""

import asyncio
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from euphonium.wire.records import GroupInfo, GroupTask
from orchestrator.groups.buffer import TrajectoryBuffer
from orchestrator.groups.credit import ScoredGroup
from orchestrator.groups.staleness import Bounds
from orchestrator.state.checkpoints import RunState
from orchestrator.state.position import Position


def task(number: int, per_iteration: int = 2) -> GroupTask:
    return GroupTask(group_id=number, prompt="", seed=number, iteration=number // per_iteration)


def scored(number: int, nbytes: int = 10, per_iteration: int = 2) -> ScoredGroup:
    info = GroupInfo(
        task=task(number, per_iteration), policy_version=0, fingerprint="",
        rows=np.arange(3 * 1).reshape(3, 1), process_rewards=None,
        seconds={}, payload_bytes=nbytes,
    )  # fmt: skip
    reference: Any = f"reference to the arrays of group {number}"
    return ScoredGroup(info, reference, reference, {"icon": np.zeros(1)}, 0.0)


def make(staleness: int, groups: int, nbytes: int = 1000) -> tuple[TrajectoryBuffer, Position]:
    position = Position(RunState(iteration=0, next_group=0, world_size=1))
    return TrajectoryBuffer(Bounds(max_staleness=staleness, groups=groups, nbytes=nbytes), position), position


async def turn_over() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_group_is_held_from_its_beginning_until_its_iteration_is_trained() -> None:
    async def scene() -> None:
        buffer, position = make(staleness=1, groups=4)
        for number in range(4):
            await buffer.admit(task(number))
        assert (buffer.held().groups, buffer.held().nbytes) == (4, 0)
        for number in (1, 0, 3):
            await buffer.put(scored(number, nbytes=10 + number))
        # The one under way counts as much as the largest so far.
        assert buffer.held().nbytes == 10 + 11 + 13 + 13
        assert [group.info.task.group_id for group in buffer.get([1, 0])] == [0, 1]
        assert [group.info.task.group_id for group in buffer.get([2, 3])] == [3], "2 is under way"
        position.state = RunState(iteration=1, next_group=2, world_size=1)
        await buffer.release(2)
        assert buffer.held().groups == 2
        assert buffer.get([0, 1]) == []

    asyncio.run(scene())


def test_a_later_iteration_waits_for_room_and_the_next_one_never_does() -> None:
    async def scene() -> None:
        buffer, position = make(staleness=1, groups=2)
        await buffer.admit(task(0))
        await buffer.admit(task(1))
        ahead = asyncio.ensure_future(buffer.admit(task(2)))
        beyond = asyncio.ensure_future(buffer.admit(task(4)))
        await turn_over()
        assert not ahead.done(), "two are held already"
        await buffer.drop(task(1))
        await turn_over()
        assert ahead.done(), "one was given up"
        assert not beyond.done(), "two versions ahead"
        # Of the iteration that is trained next, whatever the bounds say.
        await buffer.admit(task(1))
        assert buffer.held().groups == 3
        position.state = RunState(iteration=1, next_group=2, world_size=1)
        await buffer.release(2)
        await turn_over()
        assert beyond.done()

    asyncio.run(asyncio.wait_for(scene(), 10))


@given(staleness=st.integers(0, 3), bound=st.integers(1, 9), per_iteration=st.integers(1, 4), choices=st.data())
def test_bounds_hold_whatever_the_order_and_everything_is_trained_once(
    staleness: int, bound: int, per_iteration: int, choices: st.DataObject
) -> None:
    iterations = 5

    async def scene() -> None:
        buffer, position = make(staleness, bound)
        waiting = {
            n: asyncio.ensure_future(buffer.admit(task(n, per_iteration))) for n in range(iterations * per_iteration)
        }
        trained: list[int] = []
        while position.iteration < iterations:
            await turn_over()
            begun = {n for n, admission in waiting.items() if admission.done()}
            ahead = [n for n in begun if n // per_iteration > position.iteration and n not in trained]
            assert all(n // per_iteration <= position.iteration + staleness for n in begun)
            assert len(ahead) <= bound
            number = choices.draw(st.sampled_from(sorted(begun - set(trained))))
            await buffer.put(scored(number, 1, per_iteration))
            wanted = range(position.iteration * per_iteration, (position.iteration + 1) * per_iteration)
            batch = buffer.get(wanted)
            if len(batch) == per_iteration:
                trained += [group.info.task.group_id for group in batch]
                first = wanted[-1] + 1
                position.state = RunState(iteration=position.iteration + 1, next_group=first, world_size=1)
                await buffer.release(first)
        assert trained == list(range(iterations * per_iteration))
        assert buffer.held().groups == 0

    asyncio.run(asyncio.wait_for(scene(), 30))

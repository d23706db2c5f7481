"""The trajectory buffer: references to the groups that wait, between rollout actors and the learner group.

The arrays are return values of calls that the driver makes, so the driver owns them: they are in the object store of
the node that drew them, outlive the actor that drew them, and are freed when the buffer drops its references. That is
why the buffer is in the driver and not in an actor of its own, whose death would take them along.

Invariants:

* A group is in the buffer from the moment that it is admitted to be drawn until it has been trained on, once.
* Groups of the iteration that is trained next always find room; those of later iterations only within the bounds of
  staleness, number and bytes (staleness.py).

Who draws waits for room (:meth:`TrajectoryBuffer.admit`), which comes when a group is finished and smaller than
expected, is dropped, or has been trained on (:meth:`TrajectoryBuffer.release`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from euphonium.config import RunConfig
from euphonium.wire.records import GroupTask
from orchestrator.groups.credit import ScoredGroup
from orchestrator.groups.staleness import Bounds, Held, may_draw
from orchestrator.state.position import Position

MEGABYTE = 1 << 20


class TrajectoryBuffer:
    """The groups that are being drawn or wait to be trained on; to be used on one event loop.

    Example:
        >>> from orchestrator.state.checkpoints import RunState
        >>> def task(number: int, iteration: int) -> GroupTask:
        ...     return GroupTask(group_id=number, prompt="a red star", seed=number, iteration=iteration)
        >>> async def main():
        ...     position = Position(RunState(iteration=0, next_group=0, world_size=1))
        ...     buffer = TrajectoryBuffer(Bounds(max_staleness=1, groups=2, nbytes=1000), position)
        ...     for number in range(3):  # groups of the next iteration always find room
        ...         await buffer.admit(task(number, iteration=0))
        ...     ahead = asyncio.ensure_future(buffer.admit(task(3, iteration=1)))
        ...     await asyncio.sleep(0)
        ...     print("admitted", ahead.done())
        ...     position.state = RunState(iteration=1, next_group=3, world_size=1)
        ...     await buffer.release(before=3)
        ...     await ahead
        ...     print("admitted", ahead.done(), buffer.held())
        >>> asyncio.run(main())
        admitted False
        admitted True Held(groups=1, nbytes=0, each=0)
    """

    def __init__(self, bounds: Bounds, position: Position) -> None:
        """Creates an empty buffer.

        Args:
            bounds: bounds of what it holds for later iterations.
            position: where the run stands, which says what iteration is trained next.
        """
        self._bounds = bounds
        self._position = position
        # None while a group is being drawn.
        self._groups: dict[int, ScoredGroup | None] = {}
        self._largest = 0
        self._room = asyncio.Condition()

    async def admit(self, task: GroupTask) -> None:
        """Waits until there is room for a group, and reserves it."""
        async with self._room:
            await self._room.wait_for(
                lambda: may_draw(task.iteration, self._position.iteration, self._bounds, self.held())
            )
            self._groups[task.group_id] = None

    async def put(self, group: ScoredGroup) -> None:
        """Stores a group that has been drawn and scored."""
        async with self._room:
            self._groups[group.info.task.group_id] = group
            self._largest = max(self._largest, group.info.payload_bytes)
            self._room.notify_all()

    async def drop(self, task: GroupTask) -> None:
        """Removes a group that could not be drawn or scored."""
        async with self._room:
            self._groups.pop(task.group_id, None)
            self._room.notify_all()

    async def wait(self, happened: Callable[[], bool]) -> None:
        """Waits until something has happened that the coming and going of groups brings about."""
        async with self._room:
            await self._room.wait_for(happened)

    def get(self, group_ids: Iterable[int]) -> list[ScoredGroup]:
        """The finished groups among some, by ascending number."""
        found = (self._groups.get(group) for group in sorted(group_ids))
        return [group for group in found if group is not None]

    async def release(self, before: int) -> None:
        """Removes the groups with lower numbers, which have been trained on."""
        async with self._room:
            self._groups = {number: group for number, group in self._groups.items() if number >= before}
            self._room.notify_all()

    def clear(self) -> None:
        """Removes all groups."""
        self._groups.clear()

    def held(self) -> Held:
        """Number and size of the groups in the buffer; one that is being drawn counts as much as the largest so far."""
        nbytes = [self._largest if group is None else group.info.payload_bytes for group in self._groups.values()]
        return Held(groups=len(nbytes), nbytes=sum(nbytes), each=self._largest)


def buffer_bounds(config: RunConfig) -> Bounds:
    """The buffer's bounds by the recipe; without ``rollout.buffer_groups``, as many groups as staleness allows."""
    rollout = config.rollout
    every = (rollout.max_staleness + 1) * rollout.prompts_per_iteration
    return Bounds(
        max_staleness=rollout.max_staleness,
        groups=rollout.buffer_groups or every,
        nbytes=int(rollout.buffer_mb * MEGABYTE),
    )

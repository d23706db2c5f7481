"""The trajectory buffer: trajectories and log-probabilities in the object store, between rollout actors and learners.

The arrays are return values of calls that the driver makes, so the driver owns them: they lie in the object store of
the node that drew them, outlive the actor that drew them, and go when the buffer lets go of its references. That is
why the buffer lives in the driver and not in an actor of its own, whose death would take them along.

Invariants:

* A group is in the buffer from the moment that its drawing begins until the policy has been trained on it, once.
* Groups of the iteration that is trained next always find room; those of later iterations only within the bounds of
  staleness, number and bytes (staleness.py).

Waits for: room (:meth:`TrajectoryBuffer.admit`). Unblocked by: a group that came out smaller than expected or was given
up, and :meth:`TrajectoryBuffer.release`, when an iteration has been trained.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from euphonium.config import RunConfig
from euphonium.wire.records import GroupTask
from orchestrator.groups.credit import ScoredGroup
from orchestrator.groups.staleness import Bounds, Held, may_draw
from orchestrator.state.position import Position

MEGABYTE = 1 << 20


class TrajectoryBuffer:
    """Groups that have been begun and not trained on; for use within one event loop."""

    def __init__(self, bounds: Bounds, position: Position) -> None:
        """An empty buffer.

        Args:
            bounds: of what it holds for later iterations.
            position: of the run, which decides what is trained next.
        """
        self._bounds = bounds
        self._position = position
        # None while a group is under way.
        self._groups: dict[int, ScoredGroup | None] = {}
        self._largest = 0
        self._room = asyncio.Condition()

    async def admit(self, task: GroupTask) -> None:
        """Waits until there is room for a group, and takes it."""
        async with self._room:
            await self._room.wait_for(
                lambda: may_draw(task.iteration, self._position.iteration, self._bounds, self.held())
            )
            self._groups[task.group_id] = None

    async def put(self, group: ScoredGroup) -> None:
        """Takes in a group that has been drawn and scored."""
        async with self._room:
            self._groups[group.info.task.group_id] = group
            self._largest = max(self._largest, group.info.payload_bytes)
            self._room.notify_all()

    async def drop(self, task: GroupTask) -> None:
        """Gives up a group that could not be had."""
        async with self._room:
            self._groups.pop(task.group_id, None)
            self._room.notify_all()

    def get(self, group_ids: Iterable[int]) -> list[ScoredGroup]:
        """Those of some groups that are there, in the order of their numbers."""
        found = (self._groups.get(group) for group in sorted(group_ids))
        return [group for group in found if group is not None]

    async def release(self, before: int) -> None:
        """Lets go of the groups below a number: the policy has been trained on them."""
        async with self._room:
            self._groups = {number: group for number, group in self._groups.items() if number >= before}
            self._room.notify_all()

    def clear(self) -> None:
        """Lets go of everything."""
        self._groups.clear()

    def held(self) -> Held:
        """Groups that have been begun and not trained on; those under way count as much as the largest so far."""
        nbytes = [self._largest if group is None else group.info.payload_bytes for group in self._groups.values()]
        return Held(groups=len(nbytes), nbytes=sum(nbytes), each=self._largest)


def buffer_bounds(config: RunConfig) -> Bounds:
    """What a recipe lets the buffer hold; without a number of groups, all that the staleness allows."""
    rollout = config.rollout
    every = (rollout.max_staleness + 1) * rollout.prompts_per_iteration
    return Bounds(
        max_staleness=rollout.max_staleness,
        groups=rollout.buffer_groups or every,
        nbytes=int(rollout.buffer_mb * MEGABYTE),
    )

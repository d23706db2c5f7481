"""The roster of a pool: its members, their states, and which of them are in use. Plain asyncio, no Ray.

A member is *starting* until it has loaded its models, then *present*; *absent* if it was lost and may come back;
*leaving* once the pool was told to shrink. Only present members are handed out.

Callers wait here for an idle member, for members to join, or for work to end, all on one condition. Joining, releasing
and removing a member wake them. Losing a member, or telling it to leave, ends no wait, and so needs no event loop.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from euphonium.errors import TrainingError

_H = TypeVar("_H")

State = Literal["starting", "present", "absent", "leaving"]


@dataclass(eq=False)
class Member(Generic[_H]):
    """One member of a pool.

    Attributes:
        name: ``<role>-<index>``.
        handle: handle of the actor.
        state: ``starting``, ``present``, ``absent`` or ``leaving``, as described at the top of this file.
        since: time of the last change of state, on the monotonic clock.
        node: id of the Ray node that it is on, once it has answered.
        joins: how many times it has become present; after a restart it has forgotten what it knew.
    """

    name: str
    handle: _H
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    node: str = ""
    joins: int = 0

    def become(self, state: State) -> None:
        """Changes the state, and notes the time."""
        self.state, self.since = state, time.monotonic()


@dataclass(frozen=True, eq=False)
class _Use(Generic[_H]):
    """Work under way with one member, or with whichever member answers (None)."""

    member: Member[_H] | None


class Roster(Generic[_H]):
    """The members of one pool.

    Attributes:
        members: all members.
        wanted: size that was last asked for, less the members that were given up.

    Example:
        >>> async def main():
        ...     roster = Roster("no actor is left")
        ...     for name in ("rollout-0", "rollout-1"):
        ...         roster.add(Member(name, handle=name))
        ...     for member in roster.members:
        ...         await roster.join(member)
        ...     async with roster.exclusive(priority=0) as one, roster.exclusive(priority=0) as other:
        ...         print(one.name, other.name)  # a member works for one caller at a time
        ...     roster.lose(one)
        ...     async with roster.exclusive(priority=0) as member:
        ...         print(member.name, [member.state for member in roster.members])
        >>> asyncio.run(main())
        rollout-0 rollout-1
        rollout-1 ['absent', 'present']
    """

    def __init__(self, nobody_left: str) -> None:
        """Creates an empty roster.

        Args:
            nobody_left: error message for callers that wait when no member is left.
        """
        self.members: list[Member[_H]] = []
        self.wanted = 0
        self._nobody_left = nobody_left
        self._failure: TrainingError | None = None
        self._uses: set[_Use[_H]] = set()
        self._queue: list[tuple[int, int]] = []
        self._order = itertools.count()
        self._changed = asyncio.Condition()

    # --- members ------------------------------------------------------------------------------------------------

    @property
    def present(self) -> list[Member[_H]]:
        """Members that take work."""
        return [member for member in self.members if member.state == "present"]

    @property
    def reachable(self) -> list[Member[_H]]:
        """Members that may get requests: also absent ones, which are expected back."""
        return [member for member in self.members if member.state in ("present", "absent")]

    @property
    def starting(self) -> list[Member[_H]]:
        """Members that have not loaded their models yet."""
        return [member for member in self.members if member.state == "starting"]

    @property
    def staying(self) -> list[Member[_H]]:
        """All members except those that are leaving."""
        return [member for member in self.members if member.state != "leaving"]

    @property
    def working(self) -> list[Member[_H]]:
        """Members that are reserved by a caller."""
        taken = {use.member for use in self._uses}
        return [member for member in self.members if member in taken]

    # --- coming and going ---------------------------------------------------------------------------------------

    def add(self, member: Member[_H]) -> None:
        """Adds a member, which is starting."""
        self.members.append(member)

    async def join(self, member: Member[_H]) -> bool:
        """Makes a starting or absent member present; returns whether it was one of these."""
        if member not in self.members or member.state not in ("starting", "absent"):
            return False
        member.become("present")
        member.joins += 1
        await self._announce()
        return True

    def lose(self, member: Member[_H]) -> bool:
        """Makes a present member absent: it gets no work until it joins again. Returns whether it was present."""
        if member.state != "present":
            return False
        member.become("absent")
        return True

    def shrink(self, size: int) -> list[Member[_H]]:
        """Makes members leave: first those that are not present, then idle ones, the newest first.

        Args:
            size: number of members that stay, at least 1.

        Returns:
            The members that leave. They get no more work, but may still be working.
        """
        if size < 1:
            raise ValueError(f"a pool keeps at least one member, not {size}")
        staying, working = self.staying, set(self.working)
        ranked = sorted(enumerate(staying), key=lambda item: (item[1].state == "present", item[1] in working, -item[0]))
        leaving = [member for _, member in ranked[: max(0, len(staying) - size)]]
        for member in leaving:
            member.become("leaving")
        self.wanted = size
        return leaving

    async def remove(self, member: Member[_H]) -> bool:
        """Removes a member for good, whatever it is doing; returns whether it was in the roster."""
        if member not in self.members:
            return False
        self.members.remove(member)
        self.wanted = min(self.wanted, len(self.staying))
        self._uses = {use for use in self._uses if use.member is not member}
        await self._announce()
        return True

    async def fail(self, failure: TrainingError) -> None:
        """Makes :meth:`wait_started` raise an error."""
        self._failure = failure
        await self._announce()

    # --- work ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def exclusive(self, priority: int) -> AsyncIterator[Member[_H]]:
        """Waits for an idle member, and reserves it; the lowest priority goes first, then the earliest caller.

        Raises:
            TrainingError: no member is left.
        """
        use, member = await self._acquire(priority)
        try:
            yield member
        finally:
            await self._release(use)

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Registers work that may be sent to any reachable member; a leaving one stays until it is done."""
        use = _Use[_H](None)
        self._uses.add(use)
        try:
            yield
        finally:
            await self._release(use)

    async def _acquire(self, priority: int) -> tuple[_Use[_H], Member[_H]]:
        ticket = (priority, next(self._order))
        async with self._changed:
            bisect.insort(self._queue, ticket)
            try:
                await self._changed.wait_for(
                    lambda: not self.staying or (self._queue[0] == ticket and self._idle() is not None)
                )
                member = self._idle()
                if member is None:
                    raise TrainingError(self._nobody_left)
                use = _Use(member)
                self._uses.add(use)
                return use, member
            finally:
                # The next in the queue may have been woken while this one was still ahead of it.
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _idle(self) -> Member[_H] | None:
        working = set(self.working)
        return next((member for member in self.present if member not in working), None)

    async def _release(self, use: _Use[_H]) -> None:
        self._uses.discard(use)
        await self._announce()

    # --- waits --------------------------------------------------------------------------------------------------

    async def wait_started(self) -> None:
        """Waits until no member is starting.

        Raises:
            TrainingError: the error that was passed to :meth:`fail`.
        """
        await self._wait(lambda: self._failure is not None or not self.starting)
        if self._failure is not None:
            raise self._failure

    async def wait_present(self) -> None:
        """Waits until a member is present.

        Raises:
            TrainingError: no member is left.
        """
        await self._wait(lambda: bool(self.present) or not self.staying)
        if not self.present:
            raise TrainingError(self._nobody_left)

    async def wait_idle(self) -> None:
        """Waits until all work that was under way when it was called has ended."""
        before = set(self._uses)
        await self._wait(lambda: not before & self._uses)

    async def wait_released(self, member: Member[_H]) -> None:
        """Waits until all work that a member may have been doing when it was called has ended."""
        before = {use for use in self._uses if use.member is None or use.member is member}
        await self._wait(lambda: not before & self._uses)

    async def _wait(self, predicate: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(predicate)

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

"""Who is in a pool, in which state, and who works with whom. Plain asyncio: nothing here knows Ray.

A member is *starting* until it has loaded its models, then *present*; *absent* when it was lost and may come back;
*leaving* once the pool was told to shrink. Only present members are handed out.

Everybody who waits here waits on one condition: for a member to be handed out, for members to join, or for work to
end. Whoever joins, releases or removes a member wakes them. To lose a member or to let it leave ends no wait, so that
these need no event loop.
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
        handle: what is called.
        state: see the module.
        since: when the state last changed (monotonic clock).
        node: id of the node that it is on, once it has answered.
        joins: how often it has become present; each time after the first it may have forgotten what it was told.
    """

    name: str
    handle: _H
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    node: str = ""
    joins: int = 0

    def become(self, state: State) -> None:
        """Changes the state."""
        self.state, self.since = state, time.monotonic()


@dataclass(frozen=True, eq=False)
class _Use(Generic[_H]):
    """Work under way: with one member, or with any of them (None)."""

    member: Member[_H] | None


class Roster(Generic[_H]):
    """The members of one pool.

    Attributes:
        members: all of them.
        wanted: size that was last asked for, or what is left of it.
    """

    def __init__(self, nobody_left: str) -> None:
        """An empty pool.

        Args:
            nobody_left: message of the error for those who wait when no member is left that could come.
        """
        self.members: list[Member[_H]] = []
        self.wanted = 0
        self._nobody_left = nobody_left
        self._failure: TrainingError | None = None
        self._uses: set[_Use[_H]] = set()
        self._queue: list[tuple[int, int]] = []
        self._order = itertools.count()
        self._changed = asyncio.Condition()

    # --- who is there -------------------------------------------------------------------------------------------

    @property
    def present(self) -> list[Member[_H]]:
        """Members that take work."""
        return [member for member in self.members if member.state == "present"]

    @property
    def reachable(self) -> list[Member[_H]]:
        """Members that clients may ask: also those that are absent, for they are expected back."""
        return [member for member in self.members if member.state in ("present", "absent")]

    @property
    def starting(self) -> list[Member[_H]]:
        """Members that have not answered yet."""
        return [member for member in self.members if member.state == "starting"]

    @property
    def staying(self) -> list[Member[_H]]:
        """All members but those that leave."""
        return [member for member in self.members if member.state != "leaving"]

    @property
    def working(self) -> list[Member[_H]]:
        """Members that somebody has for themselves."""
        taken = {use.member for use in self._uses}
        return [member for member in self.members if member in taken]

    # --- coming and going ---------------------------------------------------------------------------------------

    def add(self, member: Member[_H]) -> None:
        """Takes in a member that is starting."""
        self.members.append(member)

    async def join(self, member: Member[_H]) -> bool:
        """Lets a member take work; whether it did not before."""
        if member not in self.members or member.state not in ("starting", "absent"):
            return False
        member.become("present")
        member.joins += 1
        await self._announce()
        return True

    def lose(self, member: Member[_H]) -> bool:
        """Gives a present member no more work until it joins again; whether it was present."""
        if member.state != "present":
            return False
        member.become("absent")
        return True

    def shrink(self, size: int) -> list[Member[_H]]:
        """Has members leave: first those that are not there, then those that do nothing, the youngest first.

        Args:
            size: that is left; at least 1.

        Returns:
            Members that leave now. They get no more work, but may still be at some.
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
        """Takes a member out, whatever it is doing; whether it was in. The pool does not want it back."""
        if member not in self.members:
            return False
        self.members.remove(member)
        self.wanted = min(self.wanted, len(self.staying))
        self._uses = {use for use in self._uses if use.member is not member}
        await self._announce()
        return True

    async def fail(self, failure: TrainingError) -> None:
        """Ends :meth:`wait_started` with an error."""
        self._failure = failure
        await self._announce()

    # --- work ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def exclusive(self, priority: int) -> AsyncIterator[Member[_H]]:
        """A present member for oneself; of those who wait, the lowest priority goes first, then the earliest.

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
        """Work that may go to any reachable member, and is awaited before one leaves."""
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
                # The next in line may have looked before this one was out of the way.
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
        """Waits until no member is starting any more.

        Raises:
            TrainingError: that :meth:`fail` was given.
        """
        await self._wait(lambda: self._failure is not None or not self.starting)
        if self._failure is not None:
            raise self._failure

    async def wait_present(self) -> None:
        """Waits while all members are starting or absent.

        Raises:
            TrainingError: no member is left.
        """
        await self._wait(lambda: bool(self.present) or not self.staying)
        if not self.present:
            raise TrainingError(self._nobody_left)

    async def wait_idle(self) -> None:
        """Waits until all work that is under way now has ended."""
        before = set(self._uses)
        await self._wait(lambda: not before & self._uses)

    async def wait_released(self, member: Member[_H]) -> None:
        """Waits until the work that a member may be at now has ended."""
        before = {use for use in self._uses if use.member is None or use.member is member}
        await self._wait(lambda: not before & self._uses)

    async def _wait(self, predicate: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(predicate)

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

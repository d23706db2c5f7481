"""Whatever happens in whatever order: nobody is handed out twice or forgotten, and the first in line goes first."""

import asyncio
import itertools
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from euphonium.errors import TrainingError
from orchestrator.pools.roster import Member, Roster


@dataclass(eq=False)
class Caller:
    """Somebody who wants a member, and what became of it."""

    ticket: tuple[int, int]
    waits: bool = False
    member: Member[None] | None = None
    cancelled: bool = False
    release: asyncio.Event = field(default_factory=asyncio.Event)


class World:
    """A pool, all its callers, and what must be true of them."""

    def __init__(self) -> None:
        self.roster: Roster[None] = Roster("nobody is left")
        self.callers: list[Caller] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._order = itertools.count()

    async def _call(self, caller: Caller) -> None:
        caller.waits = True
        try:
            async with self.roster.exclusive(caller.ticket[0]) as member:
                caller.waits = False
                assert member.state == "present"
                assert all(other.member is not member for other in self.callers), "handed out twice"
                assert all(caller.ticket < other.ticket for other in self._waiting()), "out of order"
                caller.member = member
                try:
                    await caller.release.wait()
                finally:
                    caller.member = None
        except TrainingError:
            assert not self.roster.staying
        finally:
            caller.waits = False

    def _waiting(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.waits and not caller.cancelled]

    async def do(self, what: str, which: int) -> None:
        """One thing that may happen."""
        members = self.roster.members
        member = members[which % len(members)] if members else None
        pending = [(c, t) for c, t in zip(self.callers, self.tasks, strict=True) if not t.done()]
        if what == "call":
            self.callers.append(Caller((which % 3, next(self._order))))
            self.tasks.append(asyncio.ensure_future(self._call(self.callers[-1])))
        elif what == "release" and pending:
            pending[which % len(pending)][0].release.set()
        elif what == "cancel" and pending:
            caller, task = pending[which % len(pending)]
            caller.cancelled = True
            task.cancel()
        elif what == "add":
            self.roster.add(Member(f"m-{next(self._order)}", None))
        elif what == "shrink":
            self.roster.shrink(1 + which % 3)
        elif what == "join" and member:
            await self.roster.join(member)
        elif what == "lose" and member:
            self.roster.lose(member)
        elif what == "remove" and member:
            await self.roster.remove(member)

    def check(self) -> None:
        """Once nothing moves any more, nobody waits for what is there."""
        held = {caller.member for caller in self.callers if caller.member is not None}
        idle = [member for member in self.roster.present if member not in held]
        assert not (idle and self._waiting()), "a free member was forgotten"
        assert set(self.roster.working) == held & set(self.roster.members)
        assert self.roster.staying or not self._waiting(), "waits for nobody"


EVENTS = st.sampled_from(
    ["call", "call", "call", "release", "release", "cancel", "add", "join", "join", "lose", "remove", "shrink"]
)


async def play(members: int, events: list[tuple[str, int, int]]) -> None:
    world = World()
    for _ in range(members):
        await world.do("add", 0)
        await world.roster.join(world.roster.members[-1])
    for what, which, turns in events:
        await world.do(what, which)
        # Some things happen before the last one has had its effects.
        for _ in range(20 if turns == 3 else turns):
            await asyncio.sleep(0)
        if turns == 3:
            world.check()
    for _ in range(20):
        await asyncio.sleep(0)
    world.check()
    # In the end everybody lets go, and those who wait get their turn.
    for caller in world.callers:
        caller.release.set()
    if world.roster.present or not world.roster.staying:
        await asyncio.wait_for(asyncio.gather(*world.tasks, return_exceptions=True), 5)
        assert world.roster.working == []
    for task in world.tasks:
        task.cancel()
    for result in await asyncio.gather(*world.tasks, return_exceptions=True):
        assert result is None or isinstance(result, asyncio.CancelledError), result


@settings(max_examples=300, deadline=None)
@given(
    members=st.integers(0, 3),
    events=st.lists(st.tuples(EVENTS, st.integers(0, 30), st.integers(0, 3)), max_size=40),
)
def test_members_are_handed_out_once_in_order_and_never_forgotten(
    members: int, events: list[tuple[str, int, int]]
) -> None:
    asyncio.run(play(members, events))

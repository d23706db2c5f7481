"""A pool of Ray actors of one role, which are started, watched and handed out, and change in number during a run.

It combines three parts: the members and their states (roster.py), the actors behind them (supervisor.py), and how busy
they are (load.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from euphonium.wire.records import PoolSnapshot
from euphonium.wire.roles import PoolMember, ServerRef
from orchestrator.pools.load import Load
from orchestrator.pools.roster import Member, Roster
from orchestrator.pools.supervisor import PoolSpec, Supervisor

if TYPE_CHECKING:
    from ray.actor import ActorProxy

_M = TypeVar("_M", bound="PoolMember")


class ActorPool(Generic[_M]):
    """A pool of actors of one role. The constructor starts nothing.

    Attributes:
        spec: role, class, resources and timeouts of the actors.
        roster: the members.
    """

    def __init__(self, spec: PoolSpec[_M], say: Callable[[str], None], clients: Sequence[ActorPool[Any]] = ()) -> None:
        """Creates a pool without members.

        Args:
            spec: role, class, resources and timeouts of the actors.
            say: prints a line.
            clients: pools whose members send requests to members of this one. They may still send some to a leaving
                member until they have finished the work that they were doing when it was told to leave.
        """
        self.spec = spec
        self._clients = clients
        restarts = f"pools.{spec.role}.max_restarts ({spec.config.max_restarts})"
        self.roster: Roster[ActorProxy[_M]] = Roster(
            f"the {spec.role} pool has no actor left: each of them died more than {restarts} times or could not be "
            "placed again within pools.rejoin_timeout_s"
        )
        self._load = Load()
        self._supervisor = Supervisor(spec, self.roster, self._load, say)

    # --- size ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the configured number of actors, from within the event loop."""
        self.roster.wanted = self.spec.config.num_actors
        # Busy fractions are measured from here.
        self._load.close(0)
        self._supervisor.start(self.spec.config.num_actors)

    async def wait_started(self) -> None:
        """Waits until all actors that :meth:`start` started are present; the caller sets the deadline.

        Raises:
            TrainingError: an actor failed to start.
        """
        await self._supervisor.wait_started()

    def stop(self) -> None:
        """Stops watching the actors; they are not ended."""
        self._supervisor.stop()

    def resize(self, size: int) -> None:
        """Grows or shrinks the pool. New members join when they are ready, leaving ones finish their work first.

        Args:
            size: new size, at least 1.
        """
        missing = size - len(self.roster.staying)
        if missing > 0:
            self.roster.wanted = size
            self._supervisor.start(missing)
            return
        for member in self.roster.shrink(size):
            self._supervisor.dismiss(member, self._clients_idle)

    async def _clients_idle(self) -> None:
        await asyncio.gather(*(client.roster.wait_idle() for client in self._clients))

    def lose(self, member: Member[ActorProxy[_M]], *, kill: bool = False) -> None:
        """Gives a member no more work until it answers again.

        Args:
            member: the member that failed.
            kill: whether to kill its process, because it hangs, so that Ray restarts it.
        """
        self._supervisor.lose(member, kill=kill)

    # --- work ---------------------------------------------------------------------------------------------------

    @property
    def reachable_handles(self) -> list[ActorProxy[_M]]:
        """Handles of the members that may get requests."""
        return [member.handle for member in self.roster.reachable]

    @property
    def references(self) -> tuple[ServerRef[_M], ...]:
        """References, with names and nodes, to the members that may get requests, for clients in other processes."""
        return tuple(ServerRef(member.handle, member.name, member.node) for member in self.roster.reachable)

    @contextlib.asynccontextmanager
    async def exclusive(self, priority: int) -> AsyncIterator[Member[ActorProxy[_M]]]:
        """Waits for an idle member, and reserves it for the caller; the lowest priority goes first.

        Raises:
            TrainingError: no member is left.
        """
        async with self.roster.exclusive(priority) as member:
            self._load.begin(member.name)
            try:
                yield member
            finally:
                self._load.end(member.name)

    # --- numbers ------------------------------------------------------------------------------------------------

    def demand(self) -> dict[str, float]:
        """Resources that all members reserve together, by Ray's names."""
        return self._supervisor.demand()

    def busy_fraction(self) -> float:
        """Share of its members' time that the pool worked since the last call."""
        return self._load.close(len(self.roster.present))

    def status(self) -> PoolSnapshot:
        """A snapshot of the pool."""
        roster = self.roster
        return PoolSnapshot(
            wanted=roster.wanted,
            present=len(roster.present),
            working=sum(1 for member in roster.working if member.state == "present"),
            busy=self._load.last,
            members={member.name: member.state for member in roster.members},
        )

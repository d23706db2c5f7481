"""The Ray side of a pool: starts its actors, pings them, and acts on what becomes of them.

Every actor has a task of its own that waits for its answer to a ping; the first one, and the first after a loss, makes
it present. One that is not back in time, because it crashes again and again or because no node has room for it, is
given up, and the pool goes on smaller. While the pool as a whole is starting, an actor that fails is an error instead,
and the deadline is that of whoever waits for the start.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from euphonium.config import PoolConfig
from euphonium.errors import TrainingError
from euphonium.wire.deadlines import describe
from euphonium.wire.roles import PoolMember, kill_actor
from orchestrator.pools.load import Load
from orchestrator.pools.resources import free_resources
from orchestrator.pools.roster import Member, Roster

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from euphonium.wire.records import Readiness

_M = TypeVar("_M", bound="PoolMember")

# Starts the actor with an index under Ray's options.
ActorFactory = Callable[[int, Mapping[str, Any]], "ActorProxy[_M]"]

PING_EVERY_S = 3.0


@dataclass(frozen=True, kw_only=True)
class PoolSpec(Generic[_M]):
    """What a pool is made of.

    Attributes:
        role: name of the pool.
        config: how many actors, and what each of them takes.
        factory: starts each.
        start_timeout_s: longest wait for one that joins later.
        rejoin_timeout_s: longest wait for one that was lost.
        spread: whether they go to different nodes as far as possible.
    """

    role: str
    config: PoolConfig
    factory: ActorFactory[_M]
    start_timeout_s: float
    rejoin_timeout_s: float
    spread: bool = False


class Supervisor(Generic[_M]):
    """Keeps a roster true to what Ray says of its actors."""

    def __init__(
        self, spec: PoolSpec[_M], roster: Roster[ActorProxy[_M]], load: Load, say: Callable[[str], None]
    ) -> None:
        self._spec = spec
        self._roster = roster
        self._load = load
        self._say = say
        self._indices = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._whole = False

    def start(self, count: int) -> None:
        """Starts actors and the tasks that look after them, from within the event loop."""
        spec = self._spec
        options = {
            **spec.config.ray_options,
            "max_restarts": spec.config.max_restarts,
            "scheduling_strategy": "SPREAD" if spec.spread else "DEFAULT",
            # A lost call must come back as an error: whoever made it decides what is safe to repeat.
            "max_task_retries": 0,
        }
        for _ in range(count):
            index = next(self._indices)
            name = f"{spec.role}-{index}"
            member = Member(name, spec.factory(index, {"name": name, **options}))
            self._roster.add(member)
            self._spawn(self._watch(member))

    async def wait_started(self) -> None:
        """Waits until all first actors are present; from then on the pool outlives the loss of one.

        Raises:
            TrainingError: one failed to start.
        """
        await self._roster.wait_started()
        self._whole = True

    def stop(self) -> None:
        """Ends the tasks, not the actors."""
        for task in self._tasks:
            task.cancel()

    def demand(self) -> dict[str, float]:
        """Resources that all actors reserve together, by Ray's names."""
        return {name: each * len(self._roster.members) for name, each in self._spec.config.reserved.items()}

    def lose(self, member: Member[ActorProxy[_M]], *, kill: bool = False) -> None:
        """Gives a member no more work until it answers again.

        Args:
            member: that failed.
            kill: it hangs: end its process, so that Ray starts it anew.
        """
        if kill:
            kill_actor(member.handle, restart=True)
        if self._roster.lose(member):
            self._load.forget(member.name)
            self._say(f"{member.name} is lost; {self._strength()}")

    def dismiss(self, member: Member[ActorProxy[_M]], clients_done: Callable[[], Awaitable[None]]) -> None:
        """Ends a leaving member once its work is done.

        Args:
            member: that leaves.
            clients_done: waits until nobody may send it requests any more.
        """
        self._spawn(self._dismiss(member, clients_done))

    async def _dismiss(self, member: Member[ActorProxy[_M]], clients_done: Callable[[], Awaitable[None]]) -> None:
        await clients_done()
        await self._roster.wait_released(member)
        if await self._remove(member):
            self._say(f"{member.name} has left; {self._strength()}")

    async def _watch(self, member: Member[ActorProxy[_M]]) -> None:
        reason = await self._follow(member)
        if reason is None:
            return
        if self._must_start(member):
            await self._roster.fail(TrainingError(f"{member.name} {reason}"))
        elif member.state != "leaving" and await self._remove(member):
            self._say(f"{member.name} {reason}; going on with {self._strength()}")

    async def _follow(self, member: Member[ActorProxy[_M]]) -> str | None:
        """Pings a member as long as there is hope for it; why there is none, or None once it leaves."""
        import ray

        failures = 0
        while member in self._roster.members and member.state != "leaving":
            patience, limit = None, self._limit(member)
            if limit is not None:
                patience = member.since + limit - time.monotonic()
                if patience <= 0:
                    return f"is not there after {limit:.0f} s ({free_resources(self.demand())})"
            try:
                answer = await asyncio.wait_for(member.handle.ready.remote(), patience)
            except ray.exceptions.RayTaskError as error:
                return f"failed to start: {error.cause}"
            except ray.exceptions.RayError as error:
                if self._must_start(member):
                    return f"failed to start: {describe(error)}"
                self.lose(member)
                if isinstance(error, ray.exceptions.ActorUnavailableError):
                    # It is being restarted.
                    await asyncio.sleep(0.5)
                    continue
                # A call that was under way does not tell whether the actor will be restarted; further ones do.
                failures += 1
                if failures > self._spec.config.max_restarts + 1:
                    return f"is gone: {describe(error)}"
                await asyncio.sleep(1.0)
            except TimeoutError:
                continue
            else:
                failures = 0
                await self._answered(member, answer)
                await asyncio.sleep(PING_EVERY_S)
        return None

    def _must_start(self, member: Member[ActorProxy[_M]]) -> bool:
        """Whether a failure of the member is one of the start of the whole pool."""
        return not self._whole and member.state == "starting"

    def _limit(self, member: Member[ActorProxy[_M]]) -> float | None:
        """Longest time in the present state."""
        if member.state == "present" or self._must_start(member):
            return None
        return self._spec.start_timeout_s if member.state == "starting" else self._spec.rejoin_timeout_s

    async def _answered(self, member: Member[ActorProxy[_M]], answer: Readiness) -> None:
        member.node = answer.node
        if await self._roster.join(member) and (self._whole or member.joins > 1):
            self._say(f"{member.name} has joined; {self._strength()}")
        if answer.busy_s is not None:
            self._load.read(member.name, answer.busy_s)

    async def _remove(self, member: Member[ActorProxy[_M]]) -> bool:
        if not await self._roster.remove(member):
            return False
        kill_actor(member.handle, restart=False)
        return True

    def _strength(self) -> str:
        return f"{len(self._roster.present)} of {self._roster.wanted} {self._spec.role} actors at work"

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

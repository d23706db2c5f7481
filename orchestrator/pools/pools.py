"""Pools of Ray actors: made, awaited, handed out, watched, grown and shrunk while the run goes on.

A member is *starting* until it has loaded its models, then *present*; *absent* when it was lost and Ray is restarting
it; *leaving* once the pool was told to shrink. Absent members get no work. One that is not back in time, because it
crashes again and again or because no node has room for it, is given up, and the pool goes on smaller.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from euphonium.config import PoolConfig
from euphonium.errors import ResourcesError, TrainingError
from euphonium.wire.deadlines import describe
from euphonium.wire.records import PoolSnapshot
from orchestrator.pools.resources import autoscaler_says, free_resources

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from euphonium.wire.records import Readiness
    from euphonium.wire.roles import PoolMember

log = logging.getLogger(__name__)

_M = TypeVar("_M", bound="PoolMember")
# Class and arguments of the actor with an index.
Make = Callable[[int], tuple[type, tuple[Any, ...]]]

SAY_EVERY_S = 15.0
PING_EVERY_S = 3.0
# Asked in every step of every sample: clients prefer a server on their own node, so there should be one.
SPREAD = ("prm",)


@dataclass(eq=False)
class Member(Generic[_M]):
    """One actor of a pool.

    Attributes:
        name: of the actor, ``<role>-<index>``.
        handle: Ray's handle of it.
        state: see the module.
        users: calls under way.
        began: start of the work that has the member for itself, or None.
        since: when the state last changed (monotonic clock).
        worked_s: seconds that it has been known to work.
        node: id of the node that it is on, once it has answered.
        reported: time and value of the last cumulative reading of its own, for servers that count themselves.
    """

    name: str
    handle: ActorProxy[_M]
    state: Literal["starting", "present", "absent", "leaving"] = "starting"
    users: int = 0
    began: float | None = None
    since: float = field(default_factory=time.monotonic)
    worked_s: float = 0.0
    node: str = ""
    reported: tuple[float, float] | None = None

    def become(self, state: Literal["starting", "present", "absent", "leaving"]) -> None:
        """Changes the state."""
        self.state, self.since = state, time.monotonic()


class ActorPool(Generic[_M]):
    """Actors of one role.

    Attributes:
        role: name of the pool.
        config: what each of them takes.
        members: the actors.
        wanted: size that was last asked for.
    """

    def __init__(
        self,
        role: str,
        config: PoolConfig,
        interface: type[_M],
        make: Make,
        *,
        start_timeout_s: float = 300.0,
        rejoin_timeout_s: float = 300.0,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.role = role
        self.config = config
        self.members: list[Member[_M]] = []
        self.wanted = 0
        self._interface = interface
        self._make = make
        self._start_timeout_s = start_timeout_s
        self._rejoin_timeout_s = rejoin_timeout_s
        self._say = say
        self._indices = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[Member[_M]]]] = []
        self._order = itertools.count()
        self._watchers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._window = time.monotonic()
        self._worked_by_the_gone = 0.0
        self._busy = 0.0
        self._grow(config.num_actors)

    # --- who is there -----------------------------------------------------------------------------------------

    @property
    def present(self) -> list[Member[_M]]:
        """Members that take work."""
        return [member for member in self.members if member.state == "present"]

    @property
    def reachable(self) -> list[Member[_M]]:
        """Members that clients may ask: also those that are absent, for they are expected back."""
        return [member for member in self.members if member.state in ("present", "absent")]

    @property
    def reachable_handles(self) -> list[ActorProxy[_M]]:
        """Their handles."""
        return [member.handle for member in self.reachable]

    def demand(self) -> dict[str, float]:
        """Resources that the whole pool reserves."""
        return {name: amount * len(self.members) for name, amount in self.config.reserved.items()}

    def _grow(self, count: int) -> list[Member[_M]]:
        from euphonium.wire.roles import start_actor

        added = []
        for _ in range(count):
            index = next(self._indices)
            name = f"{self.role}-{index}"
            cls, arguments = self._make(index)
            options = {
                "name": name,
                **self.config.ray_options,
                "max_restarts": self.config.max_restarts,
                "scheduling_strategy": "SPREAD" if self.role in SPREAD else "DEFAULT",
                # A lost call must come back as an error: whoever made it decides what is safe to repeat.
                "max_task_retries": 0,
            }
            added.append(Member(name, start_actor(self._interface, cls, options, *arguments)))
        self.members += added
        self.wanted += count
        return added

    # --- work ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def exclusive(self, priority: int) -> AsyncIterator[Member[_M]]:
        """An idle member for oneself, for roles that do one thing at a time; the lowest priority goes first.

        Raises:
            TrainingError: no member is left.
        """
        member = await self._acquire(priority)
        member.began = time.monotonic()
        try:
            yield member
        finally:
            member.users -= 1
            member.worked_s += time.monotonic() - max(member.began, self._window)
            member.began = None
            self._hand_out()

    async def manned(self) -> None:
        """Waits while all members are starting or absent.

        Raises:
            TrainingError: no member is left.
        """
        while not self.present:
            self._must_have_members()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)

    async def _acquire(self, priority: int) -> Member[_M]:
        self._must_have_members()
        future: asyncio.Future[Member[_M]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._order), future))
        self._hand_out()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().users -= 1
                self._hand_out()
            raise

    def _hand_out(self) -> None:
        self._changed.set()
        idle = [member for member in self.present if member.users == 0]
        while idle and self._waiting:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                member = idle.pop(0)
                member.users += 1
                future.set_result(member)

    def _must_have_members(self) -> None:
        if not any(member.state != "leaving" for member in self.members):
            raise TrainingError(
                f"the {self.role} pool has no actor left: each of them died more than pools.{self.role}.max_restarts "
                f"({self.config.max_restarts}) times or could not be placed again within pools.rejoin_timeout_s"
            )

    # --- loss and return ---------------------------------------------------------------------------------------

    def lose(self, member: Member[_M], *, kill: bool = False) -> None:
        """Gives a member no more work until it answers again.

        Args:
            member: that failed.
            kill: it hangs: end its process, so that Ray starts it anew.
        """
        from euphonium.wire.roles import kill_actor

        if kill:
            kill_actor(member.handle, restart=True)
        if member.state == "present":
            member.become("absent")
            member.reported = None
            self._say(f"{member.name} is lost; {self._strength()}")

    def watch(self) -> None:
        """Starts to look after every member, from within the event loop."""
        for member in self.members:
            self._watch(member)

    def stop_watching(self) -> None:
        """Ends what :meth:`watch` started."""
        for task in self._watchers:
            task.cancel()

    def _watch(self, member: Member[_M]) -> None:
        task = asyncio.get_running_loop().create_task(self._look_after(member))
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _look_after(self, member: Member[_M]) -> None:
        import ray

        failures = 0
        while member in self.members and member.state != "leaving":
            patience = None
            if member.state != "present":
                limit = self._start_timeout_s if member.state == "starting" else self._rejoin_timeout_s
                patience = member.since + limit - time.monotonic()
                if patience <= 0:
                    self._give_up(member, f"is not there after {limit:.0f} s ({free_resources(self.demand())})")
                    return
            try:
                answer = await asyncio.wait_for(member.handle.ready.remote(), patience)
            except TimeoutError:
                continue
            except ray.exceptions.ActorUnavailableError:
                # It is being restarted.
                self.lose(member)
                await asyncio.sleep(0.5)
            except ray.exceptions.RayTaskError as error:
                self._give_up(member, f"failed to start: {error.cause}")
            except ray.exceptions.RayError as error:
                # A call that was under way does not tell whether the actor will be restarted; further ones do.
                failures += 1
                self.lose(member)
                if failures > self.config.max_restarts + 1:
                    self._give_up(member, f"is gone: {describe(error)}")
                await asyncio.sleep(1.0)
            else:
                failures = 0
                self._answered(member, answer)
                await asyncio.sleep(PING_EVERY_S)

    def _answered(self, member: Member[_M], answer: Readiness) -> None:
        member.node = answer.node
        if member.state in ("starting", "absent"):
            member.become("present")
            self._say(f"{member.name} has joined; {self._strength()}")
            self._hand_out()
        if answer.busy_s is not None:
            now, total = time.monotonic(), answer.busy_s
            if member.reported is not None and total >= member.reported[1]:
                member.worked_s += total - member.reported[1]
            member.reported = now, total

    def _give_up(self, member: Member[_M], reason: str) -> None:
        if member in self.members:
            self._remove(member)
            self.wanted = min(self.wanted, len(self.members))
            self._say(f"{member.name} {reason}; going on with {self._strength()}")
        if not self.members:
            try:
                self._must_have_members()
            except TrainingError as error:
                for _, _, future in self._waiting:
                    if not future.done():
                        future.set_exception(error)

    def _remove(self, member: Member[_M]) -> None:
        from euphonium.wire.roles import kill_actor

        self.members.remove(member)
        self._worked_by_the_gone += member.worked_s
        kill_actor(member.handle, restart=False)
        self._changed.set()

    def _strength(self) -> str:
        return f"{len(self.present)} of {self.wanted} {self.role} actors at work"

    # --- size ---------------------------------------------------------------------------------------------------

    def resize(self, size: int, drained: Callable[[], Awaitable[None]] | None = None) -> None:
        """Grows or shrinks the pool; new members join when they are ready, leaving ones finish their work first.

        Args:
            size: at least 1.
            drained: waits until nobody may still send requests to members that left; for servers whose clients got
                their names.
        """
        staying = [member for member in self.members if member.state != "leaving"]
        if size > len(staying):
            self.wanted = len(staying)
            for member in self._grow(size - len(staying)):
                self._watch(member)
            return
        # Those that do nothing go first, and of these the youngest.
        ranked = sorted(enumerate(staying), key=lambda item: (item[1].state == "present", item[1].users > 0, -item[0]))
        for _, member in ranked[: len(staying) - size]:
            member.become("leaving")
            task = asyncio.get_running_loop().create_task(self._see_off(member, drained))
            self._watchers.add(task)
            task.add_done_callback(self._watchers.discard)
        self.wanted = size

    async def _see_off(self, member: Member[_M], drained: Callable[[], Awaitable[None]] | None) -> None:
        if drained is not None:
            await drained()
        while member.users:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
        self._remove(member)
        self._say(f"{member.name} has left; {self._strength()}")

    async def quiet(self) -> None:
        """Waits until every piece of work that is under way now has ended."""
        busy = {id(member): member for member in self.members if member.users}
        while any(member.users and member in self.members for member in busy.values()):
            # A member that is idle for a moment, or gone, has ended what it was doing.
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.2)
            for key in [key for key, member in busy.items() if not member.users]:
                del busy[key]

    # --- numbers -----------------------------------------------------------------------------------------------

    def busy_fraction(self) -> float:
        """Share of its members' time that the pool has worked since the last call."""
        now = time.monotonic()
        span = max(now - self._window, 1e-6) * max(len(self.present), 1)
        worked = self._worked_by_the_gone
        for member in self.members:
            worked += member.worked_s
            member.worked_s = 0.0
            if member.began is not None:
                worked += now - max(member.began, self._window)
        self._worked_by_the_gone, self._window = 0.0, now
        self._busy = min(1.0, worked / span)
        return self._busy

    def snapshot(self) -> PoolSnapshot:
        """The pool as it stands."""
        return PoolSnapshot(
            wanted=self.wanted,
            present=len(self.present),
            working=sum(1 for member in self.present if member.users),
            busy=self._busy,
            members={member.name: member.state for member in self.members},
        )


async def wait_ready(pools: Sequence[ActorPool[Any]], timeout_s: float, say: Callable[[str], None]) -> None:
    """Waits until every actor has loaded its models, saying every few seconds who is missing.

    Raises:
        ResourcesError: actors could not be placed in time; says what they need and what the cluster has.
        TrainingError: an actor failed to start.
    """
    import ray

    waiting = {member.handle.ready.remote(): (pool, member) for pool in pools for member in pool.members}
    began = said = time.monotonic()
    while waiting:
        done, _ = await asyncio.to_thread(ray.wait, list(waiting), num_returns=1, timeout=1.0)
        for ref in done:
            _, member = waiting.pop(ref)
            try:
                member.node = (await ref).node
            except ray.exceptions.RayTaskError as error:
                raise TrainingError(f"{member.name} failed to start: {error.cause}") from error
            except ray.exceptions.RayError as error:
                raise TrainingError(f"{member.name} failed to start: {describe(error)}") from error
            member.become("present")
        now = time.monotonic()
        if waiting and now - began > timeout_s:
            raise ResourcesError(
                f"{_missing(waiting.values())} did not start within {timeout_s:.0f} s; {_reserved(pools)}. Add nodes, "
                "make pools smaller, or raise pools.start_timeout_s"
            )
        if waiting and now - said > SAY_EVERY_S:
            said = now
            say(f"waiting for {_missing(waiting.values())} ({now - began:.0f} s); {_reserved(pools)}")


def _missing(waiting: Iterable[tuple[ActorPool[Any], Member[Any]]]) -> str:
    """``4 of 8 rollout actors (rollout-4, ...)`` for every pool that is not complete."""
    pools: dict[str, tuple[ActorPool[Any], list[str]]] = {}
    for pool, member in waiting:
        pools.setdefault(pool.role, (pool, []))[1].append(member.name)
    return " and ".join(
        f"{len(names)} of {len(pool.members)} {role} actors ({', '.join(sorted(names))})"
        for role, (pool, names) in sorted(pools.items())
    )


def _reserved(pools: Sequence[ActorPool[Any]]) -> str:
    demand: dict[str, float] = {}
    for pool in pools:
        for name, amount in pool.demand().items():
            demand[name] = demand.get(name, 0.0) + amount
    labelled = [
        f"{pool.role} actors need a node with the labels {pool.config.labels}" for pool in pools if pool.config.labels
    ]
    return "; ".join(clause for clause in (free_resources(demand), *labelled, autoscaler_says()) if clause)

"""Asking a pool of servers: a deadline for every answer, retries elsewhere, and a circuit breaker for each server."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from euphonium.config import RewardsConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.wire.deadlines import describe, remote_error

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

_S = TypeVar("_S")
_A = TypeVar("_A")


@dataclass
class _Health:
    failures: int = 0
    failed_at: float = float("-inf")
    retry_at: float = 0.0


class ServerPool(Generic[_S]):
    """One caller's view of a pool of reward servers.

    Requests go round the servers, those of the caller's own node if there are any. A failed server is left alone for a
    moment, longer with every failure in a row; after ``breaker.failures`` of them it is skipped for
    ``breaker.cool_down_s``, and then gets one request as a probe, whose answer decides. A server whose actor has died
    for good is not asked again. While every server is being left alone, callers wait for the one that is due first, so
    that a pool of one survives its restart.

    Safe to use from several threads.
    """

    def __init__(
        self,
        role: str,
        members: Callable[[], Sequence[ActorProxy[_S]]],
        config: RewardsConfig,
        *,
        rewards: Sequence[str] = (),
        offset: int = 0,
        near: Callable[[ActorProxy[_S]], bool] = lambda server: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args as described in the class.

        Args:
            role: name of the pool, for errors.
            members: the pool's actor handles at this moment; pools change while a run goes on.
            config: deadline, attempts and breaker.
            rewards: names of the rewards that it serves, for errors.
            offset: server to begin with, so that callers do not all begin with the same one.
            near: whether a server is on the caller's own node; those are asked as long as they answer.
            clock: seconds.
        """
        self._role = role
        self._members = members
        self._rewards = tuple(rewards)
        self._attempts = config.attempts
        self._breaker = config.breaker
        self._near = near
        self._clock = clock
        self._turns = itertools.count(offset)
        self._health: dict[ActorProxy[_S], _Health] = {}
        self._dead: dict[ActorProxy[_S], str] = {}
        self._lock = threading.Lock()
        self.deadline_s = config.deadline_s

    def choose(self) -> tuple[ActorProxy[_S], float]:
        """The server for the next attempt, and the seconds to wait before it.

        Raises:
            RewardError: all servers are dead for good.
        """
        with self._lock:
            members = list(self._members())
            self._forget_others(members)
            alive = [server for server in members if server not in self._dead]
            if not alive:
                last = next(iter(reversed(self._dead.values())), "the pool has no servers")
                raise self._error(f"all {len(members)} servers of the {self._role} pool are dead: {last}")
            first = next(self._turns) % len(alive)
            now = self._clock()
            server = min(
                [*alive[first:], *alive[:first]],
                key=lambda one: (max(now, self._health.get(one, _Health()).retry_at), not self._near(one)),
            )
            health = self._health.setdefault(server, _Health())
            pause = max(0.0, health.retry_at - now)
            if self._open(health):
                # This request is the probe. If its outcome never comes, because the caller gave up, another one is due.
                health.retry_at = now + pause + self._breaker.cool_down_s
            return server, min(pause, self._breaker.cool_down_s, self.deadline_s)

    def succeeded(self, server: ActorProxy[_S]) -> None:
        """Notes that a server answered."""
        with self._lock:
            self._health[server] = _Health()

    def failed(self, server: ActorProxy[_S], *, asked_at: float | None = None, dead: str | None = None) -> None:
        """Notes that a server did not answer.

        Args:
            server: which.
            asked_at: time of the request; those that were under way together fail together, and count once.
            dead: why it never will answer again.
        """
        with self._lock:
            now = self._clock()
            if dead is not None:
                self._dead[server] = dead
            health = self._health.setdefault(server, _Health())
            if asked_at is not None and asked_at < health.failed_at:
                return
            health.failures += 1
            health.failed_at = now
            # A killed server needs a moment to restart; without a pause all attempts are gone before it is back.
            pause = self._breaker.cool_down_s if self._open(health) else min(2.0**health.failures, self.deadline_s / 4)
            health.retry_at = now + pause

    def begin(self, send: Callable[[ActorProxy[_S]], ObjectRef[_A]]) -> Call[_S, _A]:
        """Sends a request now, whose answer is fetched later."""
        return Call(self, send)

    async def ask(self, send: Callable[[ActorProxy[_S]], ObjectRef[_A]], deadline_s: float | None = None) -> _A:
        """Sends a request and awaits its answer.

        Args:
            send: makes the Ray call.
            deadline_s: for each attempt, if another than the pool's.

        Raises:
            RewardError: no server answered, or the reward itself failed.
        """
        import ray

        failures: list[RewardError] = []
        while len(failures) < self._attempts:
            server, pause = self.choose()
            await asyncio.sleep(pause)
            asked_at = self._clock()
            try:
                answer = await asyncio.wait_for(send(server), deadline_s or self.deadline_s)
            except (TimeoutError, ray.exceptions.RayError) as error:
                failures.append(self._judge(server, error, asked_at))
            else:
                self.succeeded(server)
                return answer
        raise self._exhausted(failures)

    def _fetch(
        self,
        server: ActorProxy[_S],
        ref: ObjectRef[_A],
        send: Callable[[ActorProxy[_S]], ObjectRef[_A]],
        asked_at: float,
    ) -> _A:
        """The answer to a request under way, or to its repetitions."""
        import ray

        failures: list[RewardError] = []
        while True:
            try:
                answer = ray.get(ref, timeout=self.deadline_s)
            except ray.exceptions.RayError as error:
                failures.append(self._judge(server, error, asked_at))
            else:
                self.succeeded(server)
                return answer
            if len(failures) == self._attempts:
                raise self._exhausted(failures)
            server, pause = self.choose()
            time.sleep(pause)
            asked_at, ref = self._clock(), send(server)

    def _judge(self, server: ActorProxy[_S], error: Exception, asked_at: float) -> RewardError:
        """Books a failed attempt and says why it failed; raises what another attempt cannot mend."""
        import ray

        dead = None
        # First, because Ray's error is also an instance of whatever the server raised.
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = remote_error(error, f"a server of the {self._role} pool")
            if isinstance(cause, NonFiniteRewardError):
                self.succeeded(server)
                raise cause from error
            failure = cause if isinstance(cause, RewardError) else RewardError(str(cause))
        elif isinstance(error, TimeoutError):
            failure = RewardError(f"no answer within {self.deadline_s:.0f} s")
        else:
            failure = RewardError(describe(error))
            # For an actor that is about to restart, Ray raises another error.
            dead = str(failure) if isinstance(error, ray.exceptions.ActorDiedError) else None
        self.failed(server, asked_at=asked_at, dead=dead)
        return failure

    def _exhausted(self, failures: Sequence[RewardError]) -> RewardError:
        reasons = "; ".join(map(str, failures))
        message = f"the {self._role} pool did not answer in {len(failures)} attempts: {reasons}"
        return self._error(message, failures[-1].rewards)

    def _error(self, message: str, rewards: Sequence[str] = ()) -> RewardError:
        return RewardError(
            f"{message}. Look at the servers' logs (ray logs actor), or raise rewards.deadline_s, "
            f"pools.{self._role}.num_actors or pools.{self._role}.max_restarts",
            rewards or self._rewards,
        )

    def _open(self, health: _Health) -> bool:
        return health.failures >= self._breaker.failures

    def _forget_others(self, members: Sequence[ActorProxy[_S]]) -> None:
        for server in set(self._health).difference(members):
            del self._health[server]
        for server in set(self._dead).difference(members):
            del self._dead[server]


class Call(Generic[_S, _A]):
    """A request under way."""

    def __init__(self, servers: ServerPool[_S], send: Callable[[ActorProxy[_S]], ObjectRef[_A]]) -> None:
        self._servers = servers
        self._send = send
        self._server, pause = servers.choose()
        self._due = servers._clock() + pause
        # A caller that has other work to do first must not sleep here.
        self._ref = None if pause > 0 else send(self._server)

    def result(self) -> _A:
        """The answer; waits if it must.

        Raises:
            RewardError: no server answered, or the reward itself failed.
        """
        if self._ref is None:
            time.sleep(max(0.0, self._due - self._servers._clock()))
            self._due = self._servers._clock()
            self._ref = self._send(self._server)
        return self._servers._fetch(self._server, self._ref, self._send, self._due)

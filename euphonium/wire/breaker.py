"""A circuit breaker: which server of a pool to ask next, given the outcomes of earlier requests.

It sends nothing itself; :mod:`euphonium.wire.clients` does, and reports the outcomes here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from euphonium.config import RewardsConfig

K = TypeVar("K", bound=Hashable)


@dataclass
class _Health:
    failures: int = 0
    failed_at: float = float("-inf")
    retry_at: float = 0.0


class Breaker(Generic[K]):
    """One caller's record of which servers of a pool answer; thread-safe.

    Requests go round robin over the servers, over the near ones if there are any. A server that failed is skipped for a
    moment, longer with every failure in a row; after ``breaker.failures`` of them it is skipped for
    ``breaker.cool_down_s``, then gets one request as a probe, whose outcome decides. A server that is dead for good is
    not asked again. While all servers are being skipped, callers wait for the one that is due first, so that a pool of
    one survives its restart.

    Example:
        >>> from euphonium.config import BreakerConfig, OutcomeRewardConfig
        >>> rewards = [OutcomeRewardConfig(name="motion", type="sprite_motion")]
        >>> config = RewardsConfig(outcome=rewards, breaker=BreakerConfig(failures=1, cool_down_s=10))
        >>> now = 0.0
        >>> breaker = Breaker(lambda: ["a", "b"], config, clock=lambda: now)
        >>> breaker.choose()  # the server, and the seconds to wait before asking it
        ('a', 0.0)
        >>> breaker.failed("a")
        >>> [breaker.choose()[0] for _ in range(3)]
        ['b', 'b', 'b']
        >>> now = 10.0
        >>> sorted({breaker.choose()[0] for _ in range(4)})  # a is probed
        ['a', 'b']
    """

    def __init__(
        self,
        members: Callable[[], Sequence[K]],
        config: RewardsConfig,
        *,
        near: Callable[[K], bool] = lambda server: False,
        offset: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without failures.

        Args:
            members: returns the servers at this moment; pools change while a run goes on.
            config: the breaker's settings, and the deadline, which bounds every pause.
            near: whether a server is preferred as long as it answers: those on the caller's own node are.
            offset: index of the first server to ask, so that callers do not all begin with the same one.
            clock: returns seconds.
        """
        self._members = members
        self._config = config.breaker
        self._deadline_s = config.deadline_s
        self._near = near
        self._turns = itertools.count(offset)
        self._clock = clock
        self._health: dict[K, _Health] = {}
        self._dead: dict[K, str] = {}
        self._lock = threading.Lock()

    def choose(self) -> tuple[K, float]:
        """The server for the next attempt, and the seconds to wait before it.

        Raises:
            LookupError: all servers are dead; says why the last one died.
        """
        with self._lock:
            members = list(self._members())
            for books in (self._health, self._dead):
                for server in set(books).difference(members):
                    del books[server]
            alive = [server for server in members if server not in self._dead]
            if not alive:
                raise LookupError(next(iter(reversed(self._dead.values())), "the pool has no servers"))
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
                health.retry_at = now + pause + self._config.cool_down_s
            return server, min(pause, self._config.cool_down_s, self._deadline_s)

    def succeeded(self, server: K) -> None:
        """Records that a server answered."""
        with self._lock:
            self._health[server] = _Health()

    def failed(self, server: K, *, asked_at: float | None = None, dead: str | None = None) -> None:
        """Records that a server did not answer.

        Args:
            server: the server.
            asked_at: time of the request; of requests that were under way together, only one failure counts.
            dead: why it will never answer again, if it will not.
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
            pause = self._config.cool_down_s if self._open(health) else min(2.0**health.failures, self._deadline_s / 4)
            health.retry_at = now + pause

    def _open(self, health: _Health) -> bool:
        return health.failures >= self._config.failures

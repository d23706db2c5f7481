"""A circuit breaker: which servers of a pool may be asked, given the outcomes of earlier requests.

It sends nothing itself; :mod:`euphonium.wire.clients` does, and reports the outcomes here. Which of them is asked the
load balancer chooses (euphonium/wire/balancer.py).
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

    A server that failed is skipped for a moment, longer with every failure in a row; after ``breaker.failures`` of them
    it is skipped for ``breaker.cool_down_s``, then gets one request as a probe, whose outcome decides. A server that is
    dead for good is not asked again. While all servers are being skipped, callers wait for the one that is due first,
    so that a pool of one survives its restart.

    Example:
        >>> from euphonium.config import BreakerConfig, OutcomeRewardConfig
        >>> rewards = [OutcomeRewardConfig(name="motion", type="sprite_motion")]
        >>> config = RewardsConfig(outcome=rewards, breaker=BreakerConfig(failures=1, cool_down_s=10))
        >>> now = 0.0
        >>> breaker = Breaker(lambda: ["a", "b"], config, clock=lambda: now)
        >>> breaker.candidates()  # servers that may be asked, and the seconds to wait before
        (['a', 'b'], 0.0)
        >>> breaker.failed("a")
        >>> breaker.candidates()
        (['b'], 0.0)
        >>> now = 10.0
        >>> breaker.candidates()
        (['a', 'b'], 0.0)
        >>> [breaker.admit("a") for _ in range(2)]  # a is probed, once
        [True, False]
    """

    def __init__(
        self,
        members: Callable[[], Sequence[K]],
        config: RewardsConfig,
        *,
        offset: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without failures.

        Args:
            members: returns the servers at this moment; pools change while a run goes on.
            config: the breaker's settings, and the deadline, which bounds every pause.
            offset: index of the server that comes first, so that callers do not all begin with the same one.
            clock: returns seconds.
        """
        self._members = members
        self._config = config.breaker
        self._deadline_s = config.deadline_s
        self._turns = itertools.count(offset)
        self._clock = clock
        self._health: dict[K, _Health] = {}
        self._dead: dict[K, str] = {}
        self._lock = threading.Lock()

    def candidates(self) -> tuple[list[K], float]:
        """Servers that may be asked, and the seconds to wait before asking.

        Returns:
            Those that may be asked now, another one first at every call, and no wait: :meth:`admit` says whether the
            one that is chosen may still be. While there are none, the one that is due first, and the time until then.

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
            ordered = [*alive[first:], *alive[:first]]
            now = self._clock()
            due = [server for server in ordered if self._retry_at(server) <= now]
            if due:
                return due, 0.0
            server = min(ordered, key=self._retry_at)
            pause = self._retry_at(server) - now
            self._reserve(server, now + pause)
            return [server], min(pause, self._config.cool_down_s, self._deadline_s)

    def admit(self, server: K) -> bool:
        """Whether a server that was a candidate may be asked: another request may be its probe by now."""
        with self._lock:
            now = self._clock()
            if self._is_open(server) and self._retry_at(server) > now:
                return False
            self._reserve(server, now)
            return True

    def _retry_at(self, server: K) -> float:
        return self._health.get(server, _Health()).retry_at

    def _is_open(self, server: K) -> bool:
        return self._health.get(server, _Health()).failures >= self._config.failures

    def _reserve(self, server: K, at: float) -> None:
        """Notes that a request is sent, which is the probe if the server had one too many failures."""
        if self._is_open(server):
            # If its outcome never comes, because the caller gave up, another one is due.
            self._health[server].retry_at = at + self._config.cool_down_s

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
            backoff = min(2.0**health.failures, self._deadline_s / 4)
            health.retry_at = now + (self._config.cool_down_s if self._is_open(server) else backoff)

"""Which server of a pool gets a request: the one with the fewest outstanding requests, counted over all clients.

A run has one :class:`LoadBalancer`, an actor beside the driver, because the many clients of a few servers know nothing
of each other. It assigns one request after another and counts it at once, so that clients that ask at the same moment
do not all go to the server that was idle a moment ago. A client waits for it before it sends a request, for
``ASSIGN_TIMEOUT_S`` at most; while it does not answer, and in pools of one, clients go by their own requests alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from euphonium.role_logs import keep_role_log
from euphonium.wire.deadlines import describe
from euphonium.wire.roles import Balancer, ServerRef

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

log = logging.getLogger(__name__)

S = TypeVar("S")

ASSIGN_TIMEOUT_S = 0.5
# After a timeout it is left alone for a while: its restart takes longer than a request may wait.
AWAY_S = 5.0


class LoadBalancer:
    """Outstanding requests by server, as clients report them; thread-safe.

    A request whose end is never reported, because its client died, counts until its lifetime is over.

    Example:
        >>> balancer = LoadBalancer()
        >>> servers = ["prm-0", "prm-1"]
        >>> [balancer.assign(ticket, servers, ["prm-1"], 60.0) for ticket in "abc"]
        ['prm-1', 'prm-0', 'prm-1']
        >>> balancer.done("b")
        >>> balancer.assign("d", servers, ["prm-1"], 60.0)
        'prm-0'
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, run_dir: Path | None = None) -> None:
        """Starts without requests.

        Args:
            clock: returns seconds.
            run_dir: folder of the run, for the log.
        """
        keep_role_log(run_dir, repr(self))
        self._clock = clock
        self._requests: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "load-balancer"

    def assign(self, ticket: str, servers: Sequence[str], near: Sequence[str], lifetime_s: float) -> str:
        """Gives a request to a server, and counts it there.

        Args:
            ticket: the client's name for the request. One that has a server already leaves it.
            servers: names of those that may get it, at least one; of equal ones the first is taken.
            near: those that are preferred among servers with equally many requests.
            lifetime_s: seconds after which the request no longer counts, if its end is not reported.

        Returns:
            Name of the one with the fewest outstanding requests.
        """
        with self._lock:
            now = self._clock()
            self._requests.pop(ticket, None)
            known = len(self._requests)
            self._requests = {one: entry for one, entry in self._requests.items() if entry[1] > now}
            if expired := known - len(self._requests):
                log.warning("%d requests were never reported as over; they count no longer", expired)
            counts = Counter(server for server, _ in self._requests.values())
            server = min(servers, key=lambda name: (counts[name], name not in near))
            self._requests[ticket] = server, now + lifetime_s
            return server

    def done(self, ticket: str) -> None:
        """Ends a request, answered or not; one that is not known, from before a restart, is ignored."""
        with self._lock:
            self._requests.pop(ticket, None)

    def outstanding(self) -> dict[str, int]:
        """Number of outstanding requests, by the servers that have any."""
        with self._lock:
            now = self._clock()
            return dict(Counter(server for server, expires in self._requests.values() if expires > now))


class Balancing(Generic[S]):
    """One client's part: it asks the run's load balancer, and does without it while there is none; thread-safe.

    A choice takes two steps, between which the caller awaits the answer, on its event loop or in its thread:
    :meth:`propose` and :meth:`settle`.
    """

    def __init__(
        self, shared: Callable[[], ActorProxy[Balancer] | None], node: str, clock: Callable[[], float]
    ) -> None:
        """Asks nobody.

        Args:
            shared: returns the run's load balancer, or None where there is none.
            node: id of the Ray node whose servers are preferred among equals; empty for no preference.
            clock: returns seconds.
        """
        self._shared = shared
        self._node = node
        self._clock = clock
        self._own = LoadBalancer(clock)
        self._away_until = float("-inf")
        self._reported: set[str] = set()

    def propose(self, ticket: str, servers: Sequence[ServerRef[S]], lifetime_s: float) -> ObjectRef[str] | None:
        """Asks for a server; a choice of one is only reported.

        Returns:
            The name of the server, under way; None if there is nothing to choose, or nobody to ask.
        """
        shared = self._shared()
        if shared is None or self._clock() < self._away_until:
            return None
        names = [server.name for server in servers]
        self._reported.add(ticket)
        answer = shared.assign.remote(ticket, names, self._near(servers), lifetime_s)
        return answer if len(servers) > 1 else None

    def failed(self, error: Exception) -> None:
        """Records that the load balancer did not answer."""
        log.warning(
            "the load balancer does not answer (%s): going by the own requests for %.0f s", describe(error), AWAY_S
        )
        self._away_until = self._clock() + AWAY_S

    def settle(self, ticket: str, servers: Sequence[ServerRef[S]], name: str | None, lifetime_s: float) -> ServerRef[S]:
        """The server of a request, once the load balancer has named one, or has not (None)."""
        by_name = {server.name: server for server in servers}
        names = list(by_name) if name is None else [name]
        return by_name[self._own.assign(ticket, names, self._near(servers), lifetime_s)]

    def done(self, ticket: str) -> None:
        """Reports that a request, or an attempt of it, is over."""
        self._own.done(ticket)
        shared = self._shared()
        if ticket in self._reported and shared is not None:
            self._reported.remove(ticket)
            shared.done.remote(ticket)

    def _near(self, servers: Sequence[ServerRef[S]]) -> list[str]:
        return [server.name for server in servers if self._node and server.node == self._node]

"""Requests to a pool of reward servers, with a deadline for every attempt and retries on other servers.

There are two ways to ask: on an event loop (:meth:`RewardClient.ask`), and from a plain thread that has other work to
do before it needs the answer (:meth:`RewardClient.submit`). Both choose servers alike: the breaker says which ones may
be asked, and after what pause (euphonium/wire/breaker.py), and of these the load balancer takes the one with the fewest
outstanding requests (euphonium/wire/balancer.py).
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from euphonium.config import RewardsConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.wire.balancer import ASSIGN_TIMEOUT_S, Balancing
from euphonium.wire.breaker import Breaker
from euphonium.wire.deadlines import describe, remote_error
from euphonium.wire.later import Later
from euphonium.wire.roles import Balancer, ServerRef

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

S = TypeVar("S")
A = TypeVar("A")


class RewardClient(Generic[S]):
    """One caller's view of a pool of reward servers; thread-safe.

    Attributes:
        deadline_s: seconds that an attempt may take.
        breaker: says which servers may be asked.
        balancing: chooses among them.
    """

    def __init__(
        self,
        role: Literal["prm", "orm"],
        members: Callable[[], Sequence[ServerRef[S]]],
        config: RewardsConfig,
        *,
        offset: int = 0,
        node: str = "",
        balancer: Callable[[], ActorProxy[Balancer] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Creates a client; nothing is sent.

        Args:
            role: role of the pool, for errors.
            members: returns the pool's servers at this moment; pools change while a run goes on.
            config: deadline, number of attempts, and breaker.
            offset: index of the first server to ask, so that callers do not all begin with the same one.
            node: id of the Ray node whose servers are preferred among those with equally much to do; empty for no
                preference.
            balancer: returns the run's load balancer at this moment; without one, this client's requests alone count.
            clock: returns seconds.
        """
        self.deadline_s = config.deadline_s
        self.breaker = Breaker(members, config, offset=offset, clock=clock)
        self.balancing: Balancing[S] = Balancing(balancer, node, clock)
        self._tickets = map("{}-{}".format, itertools.repeat(uuid.uuid4().hex), itertools.count())
        self._role = role
        self._members = members
        self._attempts = config.attempts
        self._rewards = ("process",) if role == "prm" else tuple(reward.name for reward in config.outcome)
        self._clock = clock

    def submit(self, send: Callable[[ActorProxy[S]], ObjectRef[A]]) -> Later[A]:
        """Sends a request and returns at once.

        Args:
            send: makes the Ray call to a server.

        Returns:
            The answer. Waiting for it makes the retries, and raises a RewardError if no server answered or the reward
            itself failed.

        Raises:
            RewardError: all servers are dead.
        """
        asking = _Asking(self, send, self.deadline_s)
        self._choose(asking)
        # A caller that has other work to do first must not sleep here.
        sent = asking.send() if asking.pause_s == 0 else None
        return Later(lambda: self._wait(asking, sent))

    def _wait(self, asking: _Asking[S, A], sent: ObjectRef[A] | None) -> A:
        import ray

        while True:
            if sent is None:
                time.sleep(asking.pause_s)
                sent = asking.send()
            try:
                answer = ray.get(sent, timeout=self.deadline_s)
            except ray.exceptions.RayError as error:
                asking.failed(error)
                self._choose(asking)
                sent = None
            else:
                asking.answered()
                return answer

    def _choose(self, asking: _Asking[S, A]) -> None:
        import ray

        while True:
            proposal, name = asking.propose(), None
            if proposal is not None:
                try:
                    name = ray.get(proposal, timeout=ASSIGN_TIMEOUT_S)
                except ray.exceptions.RayError as error:
                    self.balancing.failed(error)
            if asking.settle(name):
                return

    async def ask(self, send: Callable[[ActorProxy[S]], ObjectRef[A]], deadline_s: float | None = None) -> A:
        """Sends a request and awaits its answer.

        Args:
            send: makes the Ray call to a server.
            deadline_s: seconds that an attempt may take, if not the client's.

        Raises:
            RewardError: no server answered, or the reward itself failed.
        """
        import ray

        allowed_s = deadline_s or self.deadline_s
        asking = _Asking(self, send, allowed_s)
        try:
            while True:
                await self._choose_meanwhile(asking)
                await asyncio.sleep(asking.pause_s)
                try:
                    answer = await asyncio.wait_for(asking.send(), allowed_s)
                except (TimeoutError, ray.exceptions.RayError) as error:
                    asking.failed(error)
                else:
                    asking.answered()
                    return answer
        except asyncio.CancelledError:
            asking.over()
            raise

    async def _choose_meanwhile(self, asking: _Asking[S, A]) -> None:
        import ray

        while True:
            proposal, name = asking.propose(), None
            if proposal is not None:
                try:
                    name = await asyncio.wait_for(proposal, ASSIGN_TIMEOUT_S)
                except (TimeoutError, ray.exceptions.RayError) as error:
                    self.balancing.failed(error)
            if asking.settle(name):
                return

    def _error(self, message: str, rewards: Sequence[str] = ()) -> RewardError:
        return RewardError(
            f"{message}. Look at the servers' logs (ray logs actor), or raise rewards.deadline_s, "
            f"pools.{self._role}.num_actors or pools.{self._role}.max_restarts",
            rewards or self._rewards,
        )


class _Asking(Generic[S, A]):
    """The attempts of one request. The caller sends and waits, and reports here what became of each attempt."""

    _server: ServerRef[S]

    def __init__(
        self, client: RewardClient[S], send: Callable[[ActorProxy[S]], ObjectRef[A]], deadline_s: float
    ) -> None:
        self._client = client
        self._send = send
        self._deadline_s = deadline_s
        self._ticket = next(client._tickets)
        self._failures: list[RewardError] = []
        self._asked_at = 0.0

    def propose(self) -> ObjectRef[str] | None:
        """Asks the load balancer which server the next attempt goes to; None if nobody need be waited for.

        Raises:
            RewardError: all servers are dead.
        """
        client = self._client
        try:
            self._candidates, self._pause_s = client.breaker.candidates()
        except LookupError as error:
            raise client._error(
                f"all {len(client._members())} servers of the {client._role} pool are dead: {error}"
            ) from None
        if len(client._members()) == 1:
            return None
        return client.balancing.propose(self._ticket, self._candidates, self._deadline_s + self._pause_s)

    def settle(self, name: str | None) -> bool:
        """Takes the server that the load balancer names, or another one if it names none.

        Returns:
            Whether it may be asked; if not, because another request probes it, the choice is to be made again.
        """
        client, lifetime_s = self._client, self._deadline_s + self._pause_s
        self._server = client.balancing.settle(self._ticket, self._candidates, name, lifetime_s)
        if self._pause_s == 0 and not client.breaker.admit(self._server):
            return False
        self._due = client._clock() + self._pause_s
        return True

    @property
    def pause_s(self) -> float:
        """Seconds until the next attempt is due."""
        return max(0.0, self._due - self._client._clock())

    def send(self) -> ObjectRef[A]:
        """Sends the request to the server that was chosen for this attempt."""
        self._asked_at = self._client._clock()
        return self._send(self._server.handle)

    def answered(self) -> None:
        """Records that the attempt succeeded."""
        self.over()
        self._client.breaker.succeeded(self._server)

    def over(self) -> None:
        """Records that the attempt has ended, one way or the other."""
        self._client.balancing.done(self._ticket)

    def failed(self, error: Exception) -> None:
        """Records why the attempt failed.

        Raises:
            RewardError: this was the last attempt, or another one would fail as well.
        """
        self.over()
        self._failures.append(self._judge(error))
        if len(self._failures) == self._client._attempts:
            reasons = "; ".join(map(str, self._failures))
            raise self._client._error(
                f"the {self._client._role} pool did not answer in {len(self._failures)} attempts: {reasons}",
                self._failures[-1].rewards,
            )

    def _judge(self, error: Exception) -> RewardError:
        """Reports a failure to the breaker and returns it; raises it if another attempt would fail as well."""
        import ray

        client, dead = self._client, None
        # First, because Ray's error is also an instance of whatever the server raised.
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = remote_error(error, f"a server of the {client._role} pool")
            if isinstance(cause, NonFiniteRewardError):
                client.breaker.succeeded(self._server)
                raise cause from error
            failure = cause if isinstance(cause, RewardError) else RewardError(str(cause))
        elif isinstance(error, TimeoutError):
            failure = RewardError(f"no answer within {self._deadline_s:.0f} s")
        else:
            failure = RewardError(describe(error))
            # For an actor that is about to restart, Ray raises another error.
            dead = str(failure) if isinstance(error, ray.exceptions.ActorDiedError) else None
        client.breaker.failed(self._server, asked_at=self._asked_at, dead=dead)
        return failure

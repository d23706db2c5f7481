"""A line to the learner group without Ray: a real mailbox and weight store, called in this process.

The learner group is played by coroutines that call the mailbox as ranks do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import ray.exceptions

from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from euphonium.wire.records import UpdateReport
from euphonium.wire.weights.store import WeightStore
from orchestrator.learning import link as module
from orchestrator.learning.link import LearnerLink
from orchestrator.learning.mailbox import LearnerMailbox
from orchestrator.report.tracking import Progress


class Handle:
    """Stands where Ray's handle of an actor does; the actor may die, and come back without its memory."""

    def __init__(self, made: Callable[[], Any]) -> None:
        self._made = made
        self._under_way: set[asyncio.Future[Any]] = set()
        self.actor: Any = made()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(method, arguments))

    def die(self) -> None:
        self.actor = None
        for answer in list(self._under_way):
            answer.cancel()

    def restart(self) -> None:
        self.die()
        self.actor = self._made()

    async def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if self.actor is None:
            raise ray.exceptions.ActorDiedError
        answer = asyncio.ensure_future(self._answered(getattr(self.actor, method), arguments))
        self._under_way.add(answer)
        await asyncio.wait({answer})
        self._under_way.discard(answer)
        if answer.cancelled():
            raise ray.exceptions.ActorDiedError
        return answer.result()

    @staticmethod
    async def _answered(method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = method(*arguments)
        return await result if isinstance(result, Awaitable) else result


class Impatient(LearnerMailbox):
    """Answers soon, so that the waits of the run loop run out within the test; counts its answers."""

    answers = 0

    async def state(self, number: int, generation: int, timeout_s: float) -> Any:
        state = await super().state(number, generation, min(timeout_s, 0.001))
        self.answers += 1
        return state


class Group:
    """Stands where the Ray Train run of the learner group does."""

    def __init__(self) -> None:
        self.started = False
        self.ended: TrainingError | None = None

    def start(self) -> None:
        self.started = True

    def check(self) -> None:
        if self.ended is not None:
            raise self.ended


class Setting:
    """A link to a mailbox and a store."""

    def __init__(self, config: RunConfig, mailbox: type[LearnerMailbox]) -> None:
        self.handles = {module.MAILBOX: Handle(mailbox), module.STORE: Handle(WeightStore)}
        self.mailbox, self.store = self.handles[module.MAILBOX], self.handles[module.STORE]
        self.said: list[str] = []
        self.pauses: list[Callable[[], None]] = []
        progress = Progress(1, 0)
        progress.say = self.said.append
        self.link = LearnerLink(config, progress)
        self.group: Any = Group()

    async def pause(self, _: float) -> None:
        """A pause of the link, in which something may happen."""
        if self.pauses:
            self.pauses.pop(0)()

    async def join(self, attempt: str = "a") -> Any:
        """A group of one rank joins; what it is told to resume from."""
        resumed = await self.mailbox.join.remote(attempt, 1)
        await self.mailbox.learner_ready.remote(attempt)
        return resumed

    async def work(self, attempt: str = "a") -> Any:
        """The group's next order, done."""
        order = await self.mailbox.lease.remote(0, attempt)
        await self.mailbox.acknowledge.remote(0, attempt, UpdateReport(version=order.version, metrics={"loss": 0.5}))
        return order

    async def up(self) -> LearnerLink:
        """The link to a group that has joined."""
        _, resumed = await asyncio.gather(self.join(), self.link.joined("step_3", 3))
        assert resumed == 3
        return self.link


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


async def turn_over() -> None:
    for _ in range(20):
        await asyncio.sleep(0)

"""The run loop's line to the learner group: orders one way, reports the other, through the mailbox.

The mailbox counts how often a learner group has joined it, the *generation*; an order that was meant for an earlier
generation than the present one is refused, and the run loop learns of the restart by that.

Waits for: a group that starts or restarts (``pools.learner.start_timeout_s``), and its reports
(``pools.learner.update_timeout_s``); both waits end at once when the group fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, TrainingError
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import LearnerState, Publish, UpdateOrder, UpdateReport
from euphonium.wire.roles import Mailbox, WeightDirectory, start_actor
from euphonium.wire.weights.store import WeightStore
from orchestrator.learning.group import LearnerGroup
from orchestrator.learning.mailbox import LearnerMailbox
from orchestrator.pools.ray_session import beside_the_driver
from orchestrator.report.tracking import Progress

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

MAILBOX, STORE = "learner-mailbox", "weight-store"
RECOVERY_TIMEOUT_S = 120.0

_T = TypeVar("_T")


class LearnerRestartedError(TrainingError):
    """The learner group died and is back, at the last checkpoint."""


class LearnerLink:
    """Starts the learner group, gives it orders, and knows whether it is there.

    Attributes:
        group: the learner group, or None before it was started.
        turn: to be held while the group works on orders that belong together.
    """

    _mailbox: ActorProxy[Mailbox]
    _store: ActorProxy[WeightDirectory]

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        self._config = config
        self._pool = config.pools.learner
        self._progress = progress
        self._generation = 0
        self.group: LearnerGroup | None = None
        self.turn = asyncio.Lock()

    # --- start and end ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Makes the mailbox and the weight store."""
        # Both may be restarted by Ray; what they forget is told or published again.
        options = beside_the_driver()
        self._store = start_actor(WeightDirectory, WeightStore, {"name": STORE, **options})
        self._mailbox = start_actor(Mailbox, LearnerMailbox, {"name": MAILBOX, **options})

    def start(self, group: LearnerGroup) -> None:
        """Starts a learner group; returns at once."""
        self.group = group
        group.start()

    async def replaced(self) -> None:
        """Waits until the group that was started in another's place can take orders.

        Raises:
            TrainingError: it failed, or did not come in time.
            LearnerRestartedError: the mailbox died over it.
        """
        await self._joined(self._generation)

    async def joined(self, checkpoint: str | None, iteration: int) -> int:
        """Waits until a group that starts, or that died, can take orders; also if the mailbox dies over it.

        Args:
            checkpoint: folder from which a group resumes that has not joined yet.
            iteration: of that checkpoint.

        Returns:
            The iteration from which the group goes on.

        Raises:
            TrainingError: the group or the mailbox does not come back.
        """
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        known = self._generation
        while True:
            try:
                # A mailbox that was restarted counts from 0 and waits to be told where the run resumes from.
                state = await self._ask(lambda: self._mailbox.state.remote(-1, -1, 0.0))
                if state.generation < known:
                    known = 0
                await self.resume_from(checkpoint, iteration)
                return (await self._joined(known)).resumed
            except LearnerRestartedError:
                if time.monotonic() > deadline:
                    raise TrainingError("the learner mailbox does not come back") from None
                await asyncio.sleep(1.0)

    @property
    def has_joined(self) -> bool:
        """Whether a learner group has ever been able to take orders."""
        return self._generation > 0

    @property
    def usable(self) -> bool:
        """Whether the learner group has joined and not ended."""
        try:
            self.check()
        except TrainingError:
            return False
        return self.has_joined

    def check(self) -> None:
        """Raises if the learner group has ended.

        Raises:
            TrainingError: why.
        """
        if self.group is not None:
            self.group.check()

    def dismiss(self) -> None:
        """Notes that the group has done its last order."""
        assert self.group is not None
        self.group.dismiss()

    def join(self, timeout_s: float) -> None:
        """Waits for the group to end, after an order that says stop."""
        assert self.group is not None
        self.group.join(timeout_s)

    async def _joined(self, after: int) -> LearnerState:
        """Waits until the group that joined after a generation can take orders."""
        deadline = time.monotonic() + self._pool.start_timeout_s
        while True:
            state = await self._ask(lambda: self._mailbox.state.remote(-1, after, 2.0))
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation > after and state.ready:
                self._generation = state.generation
                return state
            self.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not start within {self._pool.start_timeout_s:.0f} s; see the Train tab of "
                    "the Ray dashboard, or raise pools.learner.start_timeout_s"
                )

    # --- orders -------------------------------------------------------------------------------------------------

    async def resume_from(self, checkpoint: str | None, iteration: int) -> None:
        """Tells from which checkpoint, of which iteration, a starting learner group resumes.

        Raises:
            LearnerRestartedError: the mailbox died.
        """
        await self._ask(lambda: self._mailbox.set_checkpoint.remote(checkpoint, iteration))

    async def carry_out(self, order: UpdateOrder) -> UpdateReport:
        """Has the group carry out an order, and waits for its report.

        Raises:
            LearnerRestartedError: the group has gone back to the last checkpoint.
            TrainingError: it failed, or took too long.
        """
        generation = self._generation
        if not await self._ask(lambda: self._mailbox.submit.remote(order, generation)):
            raise LearnerRestartedError
        deadline = time.monotonic() + self._pool.update_timeout_s
        while True:
            state = await self._ask(lambda: self._mailbox.state.remote(order.version, generation, 5.0))
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation != generation:
                raise LearnerRestartedError
            if state.report is not None:
                return state.report
            self.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not finish iteration {order.version} within "
                    f"{self._pool.update_timeout_s:.0f} s (pools.learner.update_timeout_s)"
                )

    async def republish(self, version: int) -> None:
        """Has the group publish its weights again, unless the store has them by now.

        Args:
            version: that the group holds.

        Raises:
            LostActorError: the store does not come back.
            LearnerRestartedError: the group has gone back to the last checkpoint.
        """
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            try:
                async with self.turn:
                    if await awaited(self._store.newest.remote("policy"), 30.0, "the weight store") >= version:
                        return
                    self._progress.say(f"the weight store lacks the weights; publishing version {version} again")
                    await self.carry_out(Publish(version=version, average=self._config.optimizer.averages))
                    return
            except LostActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(1.0)

    async def _ask(self, call: Callable[[], ObjectRef[_T]]) -> _T:
        """The mailbox's answer; one that died has forgotten the learner group, which then starts anew."""
        try:
            return await awaited(call(), None, "the learner mailbox")
        except LostActorError as error:
            raise LearnerRestartedError(str(error)) from error

"""The run loop's link to the learner group: sends orders and gets reports, through the mailbox.

The mailbox gives each learner group that joins it another number, the *generation*. An order that names the generation
of an earlier group is refused, which is how the run loop learns that the group was restarted.

Waits for: a group that starts or restarts (``pools.learner.start_timeout_s``), and its reports, as long as
it gives signs of life (``pools.learner.update_timeout_s``); both waits end when the group fails.
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
    """The learner group was restarted from the last checkpoint, or is about to be."""


class LearnerLink:
    """Starts the learner group, gives it orders, and notices restarts.

    Attributes:
        group: the learner group, or None before it was started.
        turn: lock to hold while the group works on an order, or on orders that belong together.
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
        """Starts the actors of the mailbox and the weight store."""
        # Ray may restart both; the run loop then repeats what the mailbox forgot, and weights are published again.
        options = beside_the_driver()
        place = self._config.run_dir
        self._store = start_actor(WeightDirectory, WeightStore, {"name": STORE, **options}, place)
        self._mailbox = start_actor(Mailbox, LearnerMailbox, {"name": MAILBOX, **options}, place)

    def start(self, group: LearnerGroup) -> None:
        """Starts a learner group; returns at once."""
        self.group = group
        group.start()

    async def replaced(self) -> None:
        """Waits until a group that replaces another one can take orders.

        Raises:
            TrainingError: it failed, or did not start in time.
            LearnerRestartedError: the mailbox died meanwhile.
        """
        await self._joined(self._generation)

    async def joined(self, checkpoint: str | None, iteration: int) -> int:
        """Waits until a group that starts or was restarted can take orders, also if the mailbox dies meanwhile.

        Args:
            checkpoint: folder that the group resumes from if it has not joined yet; None for none.
            iteration: iteration of that checkpoint.

        Returns:
            The iteration that the group resumed from.

        Raises:
            TrainingError: the group or the mailbox does not come back.
        """
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            try:
                # A restarted mailbox lets nobody join until it knows the checkpoint.
                await self.resume_from(checkpoint, iteration)
                return (await self._joined(self._generation)).resumed
            except LearnerRestartedError:
                if time.monotonic() > deadline:
                    raise TrainingError("the learner mailbox does not come back") from None
                await asyncio.sleep(1.0)

    @property
    def has_joined(self) -> bool:
        """Whether a learner group has ever joined."""
        return self._generation > 0

    @property
    def usable(self) -> bool:
        """Whether the learner group has joined and has not ended."""
        try:
            self.check()
        except TrainingError:
            return False
        return self.has_joined

    def check(self) -> None:
        """Raises if the learner group has ended.

        Raises:
            TrainingError: it has; says why.
        """
        if self.group is not None:
            self.group.check()

    def dismiss(self) -> None:
        """Notes that the group has done its last order."""
        assert self.group is not None
        self.group.dismiss()

    def join(self, timeout_s: float) -> None:
        """Blocks until the group has ended, after an order that says stop."""
        assert self.group is not None
        self.group.join(timeout_s)

    async def _joined(self, after: int) -> LearnerState:
        """Waits until a group of another generation than ``after`` can take orders."""
        deadline = time.monotonic() + self._pool.start_timeout_s
        while True:
            state = await self._ask(lambda: self._mailbox.state.remote(-1, after, 2.0))
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation != after and state.ready:
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
        """Tells the mailbox which checkpoint, of which iteration, a starting learner group resumes from.

        Raises:
            LearnerRestartedError: the mailbox died.
        """
        await self._ask(lambda: self._mailbox.set_checkpoint.remote(checkpoint, iteration))

    async def carry_out(self, order: UpdateOrder) -> UpdateReport:
        """Has the group carry out an order, and waits for its report.

        Raises:
            LearnerRestartedError: the group was restarted; the order was not carried out, or is void.
            TrainingError: the group failed, or gave no sign of life for too long.
        """
        generation = self._generation
        if not await self._ask(lambda: self._mailbox.submit.remote(order, generation)):
            raise LearnerRestartedError
        while True:
            state = await self._ask(lambda: self._mailbox.state.remote(order.version, generation, 5.0))
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation != generation:
                raise LearnerRestartedError
            if state.report is not None:
                return state.report
            self.check()
            if state.silent_s > self._pool.update_timeout_s:
                raise TrainingError(
                    f"the learner group, at work on iteration {order.version}, has not got through a micro-batch, or "
                    f"any other part of it, for {self._pool.update_timeout_s:.0f} s (pools.learner.update_timeout_s)"
                )

    async def republish(self, version: int) -> None:
        """Has the group publish its weights again, unless the weight store has them by now.

        Args:
            version: policy version that the group holds.

        Raises:
            LostActorError: the weight store does not come back.
            LearnerRestartedError: the group was restarted.
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
        """The mailbox's answer. A mailbox that died has forgotten the learner group, which then has to join again."""
        try:
            return await awaited(call(), None, "the learner mailbox")
        except LostActorError as error:
            raise LearnerRestartedError(str(error)) from error

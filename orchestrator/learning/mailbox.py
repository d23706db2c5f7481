"""The mailbox between the run loop and the learner group: a Ray actor through which orders and reports travel.

Nobody can call into a Ray Train worker, so the learner group fetches its orders here. The mailbox holds references to
the groups of one order, never arrays: those are in the object store and owned by the driver, so they outlive the
rollout actor that drew them and this actor too.

Invariant: an order is a transaction. It is submitted once, leased by every rank once, and done when every rank has
acknowledged it; an order for an earlier learner group is never accepted.

Each start of the learner group is an *attempt*, whose name all its ranks share; calls of an earlier attempt are
refused, also those that have been waiting here since before it died. The *generation* numbers the attempt that has
joined; it is drawn at random, so that none repeats one of before, also not one that a restarted mailbox has forgotten.
The run loop submits an order for the generation that it knows of, because the group may have been restarted from a
checkpoint since. A restarted mailbox lets nobody join before it knows the checkpoint to resume from.

The run loop waits here for a report (:meth:`LearnerMailbox.state`). A rank waits for the next order
(:meth:`LearnerMailbox.lease`) and, when it starts, for the checkpoint to resume from (:meth:`LearnerMailbox.join`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from pathlib import Path

from euphonium.errors import LostActorError
from euphonium.role_logs import keep_role_log
from euphonium.wire.records import LearnerState, UpdateOrder, UpdateReport

log = logging.getLogger(__name__)


class LearnerMailbox:
    """Holds at most one order; runs on one event loop, so methods interleave only where they await.

    Example:
        >>> from euphonium.wire.records import Publish
        >>> order = Publish(version=0, average=False)
        >>> async def main():
        ...     mailbox = LearnerMailbox()
        ...     await mailbox.set_checkpoint(None, 0)
        ...     await mailbox.join("first start", world_size=1)
        ...     await mailbox.learner_ready("first start")
        ...     first = (await mailbox.state(-1, generation=0, timeout_s=1.0)).generation
        ...     print("accepted", await mailbox.submit(order, first))
        ...     print("leased", await mailbox.lease(0, "first start") == order)
        ...     await mailbox.join("second start", world_size=1)  # Ray Train has restarted the group
        ...     await mailbox.learner_ready("second start")
        ...     try:
        ...         await mailbox.acknowledge(0, "first start", UpdateReport(version=0))
        ...     except LostActorError as error:
        ...         print(error)
        ...     print("accepted", await mailbox.submit(order, first))
        >>> asyncio.run(main())
        accepted True
        leased True
        another learner group has taken this one's place
        accepted False
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        """Waits for a checkpoint to be set.

        Args:
            run_dir: folder of the run, for the log.
        """
        keep_role_log(run_dir, repr(self))
        self._changed = asyncio.Condition()
        self._order: UpdateOrder | None = None
        self._leased: set[int] = set()
        self._acknowledged: dict[int, UpdateReport] = {}
        self._report: UpdateReport | None = None
        self._failure: str | None = None
        self._generation = 0
        self._ready = False
        self._attempt = ""
        self._world_size = 0
        self._ranks_joined = 0
        self._checkpoint: tuple[str | None, int] | None = None
        self._resumed: tuple[str | None, int] = None, 0
        self._last_sign = time.monotonic()

    def __repr__(self) -> str:
        return "learner-mailbox"

    # --- the run loop's side ------------------------------------------------------------------------------------

    async def set_checkpoint(self, folder: str | None, version: int) -> None:
        """Sets the checkpoint that a starting learner group resumes from, and its policy version."""
        async with self._changed:
            self._checkpoint = folder, version
            self._changed.notify_all()

    async def submit(self, order: UpdateOrder, generation: int) -> bool:
        """Submits an order to the learner group.

        Returns:
            Whether it was accepted; not if the learner group has been restarted since ``generation``.
        """
        async with self._changed:
            if generation != self._generation or not self._ready:
                return False
            self._order = order
            self._last_sign = time.monotonic()
            self._leased.clear()
            self._acknowledged.clear()
            self._report = None
            self._changed.notify_all()
            log.info("order: %s of version %d", type(order).__name__, order.version)
            return True

    async def state(self, number: int, generation: int, timeout_s: float) -> LearnerState:
        """Waits until order ``number`` is done, the group has failed or been restarted, or the timeout is over."""

        def settled() -> bool:
            reported = self._report is not None and self._report.version == number
            return reported or self._failure is not None or (self._ready and self._generation != generation)

        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(settled), timeout_s)
            report = self._report if self._report is not None and self._report.version == number else None
            return LearnerState(
                report=report, failure=self._failure, generation=self._generation, ready=self._ready,
                resumed=self._resumed[1], silent_s=time.monotonic() - self._last_sign,
            )  # fmt: skip

    # --- the learners' side ------------------------------------------------------------------------------------

    async def join(self, attempt: str, world_size: int) -> tuple[str | None, int]:
        """Called by every rank when it starts; waits for :meth:`set_checkpoint`.

        Returns:
            The checkpoint to load, or None, and its policy version; the same for all ranks of an attempt.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._checkpoint is not None)
            assert self._checkpoint is not None
            if attempt != self._attempt:
                # Whatever an earlier attempt had under way is void: this one resumes from the checkpoint.
                self._attempt, self._world_size, self._resumed = attempt, world_size, self._checkpoint
                self._order, self._report = None, None
                self._generation, self._ready, self._ranks_joined = 1 + secrets.randbits(60), False, 0
                self._changed.notify_all()
                log.info("a learner group of %d ranks joins, at version %d", world_size, self._resumed[1])
            self._ranks_joined += 1
            return self._resumed

    async def learner_ready(self, attempt: str) -> None:
        """Called by rank 0 once the group can take orders.

        Raises:
            LostActorError: a later attempt has joined, or a part of the group has joined the mailbox before this one.
        """
        async with self._changed:
            self._must_be_current(attempt)
            if self._ranks_joined < self._world_size:
                raise LostActorError("the learner mailbox was restarted while this learner group joined it")
            self._ready = True
            self._changed.notify_all()
            log.info("the learner group takes orders")

    async def lease(self, rank: int, attempt: str) -> UpdateOrder:
        """Waits for the next order, and returns it to one rank, once.

        Raises:
            LostActorError: a later attempt has joined.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: attempt != self._attempt or (self._order is not None and rank not in self._leased)
            )
            self._must_be_current(attempt)
            assert self._order is not None
            self._leased.add(rank)
            self._last_sign = time.monotonic()
            return self._order

    async def alive(self, attempt: str) -> None:
        """Called by rank 0 while it works on an order; a sign of life of an earlier attempt says nothing."""
        if attempt == self._attempt:
            self._last_sign = time.monotonic()

    async def acknowledge(self, rank: int, attempt: str, report: UpdateReport) -> None:
        """Called by every rank when it has carried out an order; the last one completes the transaction.

        Raises:
            LostActorError: a later attempt has joined.
        """
        async with self._changed:
            self._must_be_current(attempt)
            self._acknowledged[rank] = report
            self._last_sign = time.monotonic()
            if len(self._acknowledged) == self._world_size:
                self._report = self._acknowledged[0]
                self._order = None
                self._changed.notify_all()
                log.info("version %d: all ranks have carried the order out", report.version)

    async def fail(self, attempt: str, reason: str) -> None:
        """Called by a rank that cannot go on, if a restart would not help."""
        async with self._changed:
            if attempt == self._attempt:
                self._failure = self._failure or reason
                self._changed.notify_all()
                log.error("the learner group cannot go on: %s", reason)

    def _must_be_current(self, attempt: str) -> None:
        if attempt != self._attempt:
            raise LostActorError("another learner group has taken this one's place")

"""Has the learner group begin with the first groups of an on-policy iteration while the others are drawn.

Gradients of the groups add up in the order of their ordinals, whoever is drawn first, and the update goes on from there
once all groups are there: the numbers are those of a learner that waits for the whole batch. Whoever dies meanwhile
takes nothing along: a learner group that is restarted goes on from its checkpoint as at any other time, for no weights
have been moved; a group that is lost makes the update begin anew with those that are left.

Waits for: the next groups in line, or the whole batch; and for the learner group's report of each beginning. Whoever
gives up that last wait still waits for the report, at most as long as the learner takes for the groups that were there:
an order is not cut in two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from euphonium.config import RunConfig
from euphonium.errors import EuphoniumError
from euphonium.wire.records import Begin, UpdateReport
from orchestrator.groups.batches import BatchSource
from orchestrator.groups.credit import Batch, beginning
from orchestrator.learning.link import LearnerLink
from orchestrator.state.position import Position


class Stream:
    """Takes batches from their source, and gives their groups to the learner group as they come."""

    def __init__(self, config: RunConfig, batches: BatchSource, learners: LearnerLink, position: Position) -> None:
        """Creates a stream; nothing is drawn.

        Args:
            config: configuration of the run.
            batches: where groups come from.
            learners: the line to the learner group.
            position: where the run stands.
        """
        self._config = config
        self._batches = batches
        self._learners = learners
        self._position = position
        self._seconds: Counter[str] = Counter()

    async def next(self) -> Batch:
        """Waits for the batch of the iteration that is trained next; the learner group begins with it if it may.

        Raises:
            RewardError: too many of its groups were dropped.
            LearnerRestartedError: the learner group was restarted.
            TrainingError: a pool has no actor left, or the learner group failed.
        """
        self._seconds.clear()
        if self._config.waits_for_all_groups:
            return await self._batches.next()
        batch = asyncio.ensure_future(self._batches.next())
        begun = 0
        try:
            while await self._more(batch, begun):
                begun = await _in_one_piece(self._begin())
            return await batch
        finally:
            batch.cancel()
            with contextlib.suppress(asyncio.CancelledError, EuphoniumError):
                await batch

    def whole(self, report: UpdateReport) -> UpdateReport:
        """The report of an update, with the seconds of what was done of it before the batch was whole."""
        metrics = dict(report.metrics)
        for name, seconds in self._seconds.items():
            metrics[name] = metrics.get(name, 0.0) + seconds
        metrics["time/streamed_s"] = self._seconds["time/update_s"]
        return UpdateReport(version=report.version, metrics=metrics)

    async def _more(self, batch: asyncio.Future[Batch], begun: int) -> bool:
        """Waits until there are more groups to begin with, or the batch is whole; returns whether there are."""
        more = asyncio.ensure_future(self._batches.begins_with_more_than(begun))
        either: set[asyncio.Future[Any]] = {batch, more}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            more.cancel()
        groups, expected = self._batches.beginning()
        # With all groups there, the update itself is next.
        return not batch.done() and begun < len(groups) < expected

    async def _begin(self) -> int:
        """Has the learner group begin with the groups that are there; returns their number."""
        groups, expected = self._batches.beginning()
        order = Begin(
            version=self._position.iteration,
            groups=tuple(beginning(self._config, groups)),
            payloads=tuple(group.payload for group in groups),
            expected=expected,
        )
        async with self._learners.turn:
            report = await self._learners.carry_out(order)
        self._seconds.update({name: value for name, value in report.metrics.items() if name.startswith("time/")})
        return len(groups)


async def _in_one_piece(work: Coroutine[None, None, int]) -> int:
    """Awaits work that is not cut in two: if the wait is given up, it ends first."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(EuphoniumError):
            await task
        raise

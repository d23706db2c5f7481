"""Groups for the iterations to come: drawn ahead, scored, and turned into what the learner group trains on.

As many batches are under way as ``rollout.max_staleness`` allows (staleness.py), while the run loop takes them in
order. A group whose rewards cannot be had is tried again, then dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, RewardError, WeightsMissingError
from euphonium.wire.records import GroupTask
from orchestrator.groups.credit import Batch, ScoredGroup
from orchestrator.groups.prompts import PromptStream
from orchestrator.groups.staleness import Bounds, Held, may_draw, may_start
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.position import Position
from orchestrator.report.statistics import RewardFailures

log = logging.getLogger(__name__)

MEGABYTE = 1 << 20


class BatchSource:
    """Draws and scores batches, each once, as far ahead as the bounds allow."""

    def __init__(
        self,
        config: RunConfig,
        rollouts: RolloutService,
        position: Position,
        prompts: PromptStream,
        failures: RewardFailures,
        republish: Callable[[], Awaitable[None]],
    ) -> None:
        """Args as described in the class.

        Args:
            config: of the run.
            rollouts: that draws and scores.
            position: of the run.
            prompts: where the groups come from.
            failures: counts the rewards that could not be had.
            republish: has weights that are missing published again.
        """
        self._config = config
        self._rollouts = rollouts
        self._position = position
        self._prompts = prompts
        self._failures = failures
        self._republish = republish
        self._ahead: dict[int, asyncio.Task[Batch]] = {}
        # Groups begun and not trained on, with their size once it is known.
        self._sizes: dict[int, int] = {}
        self._largest = 0
        self._room = asyncio.Condition()

    def draw_ahead(self) -> None:
        """Begins the batches that may be begun."""
        version = self._position.state.iteration
        for iteration in range(version, self._config.iterations):
            if not may_start(iteration, version, self._config.rollout.max_staleness):
                break
            if iteration not in self._ahead:
                self._ahead[iteration] = asyncio.ensure_future(self._collect(iteration))

    async def next(self) -> Batch:
        """The batch that is trained next; begins what may be begun.

        Raises:
            RewardError: too many of its groups were lost.
            TrainingError: a pool has no actor left.
        """
        self.draw_ahead()
        return await self._ahead[self._position.state.iteration]

    async def trained(self, batch: Batch) -> None:
        """Makes room: the position has moved past this batch."""
        self._ahead.pop(self._position.state.iteration - 1, None)
        async with self._room:
            self._sizes = {group: size for group, size in self._sizes.items() if group >= batch.next_group}
            self._room.notify_all()

    async def forget(self) -> None:
        """Gives up what was drawn ahead."""
        batches = list(self._ahead.values())
        self._ahead.clear()
        for batch in batches:
            batch.cancel()
        await asyncio.gather(*batches, return_exceptions=True)
        self._sizes.clear()

    def held(self) -> Held:
        """Groups that have been begun and not trained on."""
        sizes = [size or self._largest for size in self._sizes.values()]
        return Held(groups=len(sizes), nbytes=sum(sizes), each=self._largest)

    async def _collect(self, iteration: int) -> Batch:
        """Draws and scores an iteration's groups; those whose rewards cannot be had are dropped and counted."""
        began = time.monotonic()
        count, state = self._config.rollout.prompts_per_iteration, self._position.state
        first = state.next_group + (iteration - state.iteration) * count
        orders = [self._prompts.task(first + i, iteration) for i in range(count)]
        tasks = [asyncio.ensure_future(self._admitted(order)) for order in orders]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        groups = [group for group in results if isinstance(group, ScoredGroup)]
        lost = [reason for reason in results if isinstance(reason, str)]
        if len(lost) > self._config.rewards.max_dropped_fraction * count or not groups:
            raise RewardError(
                f"{len(lost)} of {count} groups were lost in one iteration (rewards.max_dropped_fraction is "
                f"{self._config.rewards.max_dropped_fraction}). The last reason: {lost[-1]}"
            )
        return Batch(groups, len(lost), first + count, time.monotonic() - began)

    async def _admitted(self, task: GroupTask) -> ScoredGroup | str:
        """Draws and scores a group once there is room for it."""
        async with self._room:
            await self._room.wait_for(
                lambda: may_draw(task.iteration, self._position.state.iteration, self._bounds(), self.held())
            )
            self._sizes[task.group_id] = 0
        result = await self._attempt(task)
        async with self._room:
            if isinstance(result, ScoredGroup):
                self._sizes[task.group_id] = result.info.payload_bytes
                self._largest = max(self._largest, result.info.payload_bytes)
            else:
                self._sizes.pop(task.group_id, None)
            self._room.notify_all()
        return result

    def _bounds(self) -> Bounds:
        rollout = self._config.rollout
        every = (rollout.max_staleness + 1) * rollout.prompts_per_iteration
        return Bounds(
            max_staleness=rollout.max_staleness,
            groups=rollout.buffer_groups or every,
            nbytes=int(rollout.buffer_mb * MEGABYTE),
        )

    async def _attempt(self, task: GroupTask) -> ScoredGroup | str:
        """A scored group, or why it was given up."""
        reason = ""
        for attempt in range(self._config.rewards.attempts):
            if attempt:
                log.warning("group %d (%s): trying again: %s", task.group_id, task.prompt, reason)
                await asyncio.sleep(min(2.0**attempt, 15.0))
            try:
                return await self._draw_and_score(task)
            except RewardError as error:
                # Every request has been tried on all servers; the same group again would ask them the same.
                self._failures.note(error)
                return str(error)
            except LostActorError as error:
                reason = str(error)
            except WeightsMissingError as error:
                reason = str(error)
                await self._republish()
        return reason

    async def _draw_and_score(self, task: GroupTask) -> ScoredGroup:
        info, latents, payload = await self._rollouts.draw(task)
        prompts = [task.prompt] * self._config.rollout.group_size
        scores, seconds = await self._rollouts.scores(latents, prompts, self._config.rewards.deadline_s)
        return ScoredGroup(info, latents, payload, scores, seconds)

"""Draws and scores the groups of the iterations to come, into the trajectory buffer.

As many batches are under way as ``rollout.max_staleness`` allows (staleness.py), while the run loop takes them in
order. A group whose rewards cannot be had is tried again, then dropped and counted.

Waits for: room in the buffer, an idle rollout actor, the answers of ORM servers (each with a deadline). Unblocked by:
whatever of these comes; a policy version that is still being trained blocks nothing, since every order says which
version it takes at least.
"""

from __future__ import annotations

import asyncio
import time

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, RewardError, WeightsMissingError
from euphonium.wire.records import GroupTask
from orchestrator.groups.buffer import TrajectoryBuffer, buffer_bounds
from orchestrator.groups.credit import Batch, ScoredGroup
from orchestrator.groups.prompts import PromptStream
from orchestrator.groups.staleness import may_start
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.report.statistics import RewardFailures
from orchestrator.state.position import Position


class BatchSource:
    """Draws and scores batches, each once, as far ahead as the bounds allow.

    Attributes:
        buffer: where the groups wait for their iteration.
    """

    def __init__(
        self,
        config: RunConfig,
        rollouts: RolloutService,
        position: Position,
        prompts: PromptStream,
        failures: RewardFailures,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            config: of the run.
            rollouts: that draws and scores.
            position: of the run.
            prompts: where the groups come from.
            failures: counts the rewards that could not be had.
        """
        self._config = config
        self._rollouts = rollouts
        self._position = position
        self._prompts = prompts
        self._failures = failures
        self.buffer = TrajectoryBuffer(buffer_bounds(config), position)
        self._ahead: dict[int, asyncio.Task[Batch]] = {}

    def draw_ahead(self) -> None:
        """Begins the batches that may be begun."""
        version = self._position.iteration
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
        return await self._ahead[self._position.iteration]

    async def trained(self, batch: Batch) -> None:
        """Makes room: the position has moved past this batch."""
        self._ahead.pop(self._position.iteration - 1, None)
        await self.buffer.release(batch.next_group)

    async def forget(self) -> None:
        """Gives up what was drawn ahead."""
        batches = list(self._ahead.values())
        self._ahead.clear()
        for batch in batches:
            batch.cancel()
        await asyncio.gather(*batches, return_exceptions=True)
        self.buffer.clear()

    async def _collect(self, iteration: int) -> Batch:
        """Draws and scores an iteration's groups; those whose rewards cannot be had are dropped and counted."""
        began = time.monotonic()
        count, state = self._config.rollout.prompts_per_iteration, self._position.state
        first = state.next_group + (iteration - state.iteration) * count
        orders = [self._prompts.task(first + i, iteration) for i in range(count)]
        tasks = [asyncio.ensure_future(self._fill(order)) for order in orders]
        try:
            reasons = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        groups = self.buffer.get(order.group_id for order in orders)
        lost = [reason for reason in reasons if reason is not None]
        if len(lost) > self._config.rewards.max_dropped_fraction * count or not groups:
            raise RewardError(
                f"{len(lost)} of {count} groups were lost in one iteration (rewards.max_dropped_fraction is "
                f"{self._config.rewards.max_dropped_fraction}). The last reason: {lost[-1]}"
            )
        return Batch(groups, len(lost), first + count, time.monotonic() - began)

    async def _fill(self, task: GroupTask) -> str | None:
        """Draws and scores a group into the buffer once there is room for it; why it was given up, if it was."""
        await self.buffer.admit(task)
        try:
            group = await self._draw_and_score(task)
        except RewardError as error:
            # Every request has been tried on all servers; the same group again would ask them the same.
            self._failures.note(error)
            reason = str(error)
        except (LostActorError, WeightsMissingError) as error:
            reason = str(error)
        else:
            await self.buffer.put(group)
            return None
        await self.buffer.drop(task)
        return reason

    async def _draw_and_score(self, task: GroupTask) -> ScoredGroup:
        info, latents, payload = await self._rollouts.draw(task)
        prompts = [task.prompt] * self._config.rollout.group_size
        scores, seconds = await self._rollouts.scores(latents, prompts, self._config.rewards.deadline_s)
        return ScoredGroup(info, latents, payload, scores, seconds)

"""Has the groups of the coming iterations drawn and scored, and collects them in the trajectory buffer.

A batch is the groups of one iteration. As many batches are under way as ``rollout.max_staleness`` allows
(staleness.py), and the run loop takes them in order. A group whose rewards cannot be computed is dropped and counted.

A batch waits for: room in the buffer, which trained iterations make; an idle rollout actor; the answers of ORM servers,
each with a deadline. It does not wait for a policy version that is still being trained, since every task says which
version it needs at least.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, RewardError, WeightsMissingError
from euphonium.wire.records import GroupTask
from orchestrator.groups.buffer import TrajectoryBuffer, buffer_bounds
from orchestrator.groups.credit import Batch, ScoredGroup
from orchestrator.groups.guidance_control import GuidanceControl
from orchestrator.groups.prompts import PromptStream
from orchestrator.groups.staleness import may_start
from orchestrator.plan.tail import tail_of_recipe
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.report.statistics import RewardFailures
from orchestrator.state.position import Position


class BatchSource:
    """Has batches drawn and scored, each once, as far ahead as the bounds allow.

    Attributes:
        buffer: the trajectory buffer, in which groups wait for their iteration.
    """

    def __init__(
        self,
        config: RunConfig,
        rollouts: RolloutService,
        position: Position,
        prompts: PromptStream,
        failures: RewardFailures,
        guidance: GuidanceControl,
    ) -> None:
        """Creates a source; nothing is drawn.

        Args:
            config: configuration of the run.
            rollouts: draws and scores groups.
            position: where the run stands.
            prompts: the tasks of the groups.
            failures: counts failed rewards.
            guidance: says how strong the guidance is.
        """
        self._config = config
        self._rollouts = rollouts
        self._position = position
        self._prompts = prompts
        self._failures = failures
        self._guidance = guidance
        self.buffer = TrajectoryBuffer(buffer_bounds(config), position)
        self._tail = tail_of_recipe(config)
        self._ahead: dict[int, asyncio.Task[Batch]] = {}
        self._lost: set[int] = set()

    def draw_ahead(self) -> None:
        """Starts the batches that staleness allows."""
        version = self._position.iteration
        for iteration in range(version, self._config.iterations):
            if not may_start(iteration, version, self._config.rollout.max_staleness):
                break
            if iteration not in self._ahead:
                self._ahead[iteration] = asyncio.ensure_future(self._collect(iteration))

    async def next(self) -> Batch:
        """Waits for the batch of the iteration that is trained next.

        Raises:
            RewardError: too many of its groups were dropped.
            TrainingError: a pool has no actor left.
        """
        self.draw_ahead()
        return await self._ahead[self._position.iteration]

    def beginning(self) -> tuple[list[ScoredGroup], int]:
        """The first groups of the next batch, up to one that is still under way, and how many it will have.

        Groups that have been lost are left out of both; more may be lost yet.
        """
        first = self._position.state.next_group
        numbers = set(range(first, first + self._config.rollout.prompts_per_iteration)) - self._lost
        there: list[ScoredGroup] = []
        for number in sorted(numbers):
            if not (found := self.buffer.get([number])):
                break
            there += found
        return there, len(numbers)

    async def begins_with_more_than(self, count: int) -> None:
        """Waits until the next batch begins with more groups than this."""
        await self.buffer.wait(lambda: len(self.beginning()[0]) > count)

    async def trained(self, batch: Batch) -> None:
        """Makes room in the buffer, once the run's position has moved past this batch."""
        self._lost = {number for number in self._lost if number >= batch.next_group}
        self._ahead.pop(self._position.iteration - 1, None)
        await self.buffer.release(batch.next_group)

    async def forget(self) -> None:
        """Drops everything that has been drawn ahead."""
        batches = list(self._ahead.values())
        self._ahead.clear()
        for batch in batches:
            batch.cancel()
        await asyncio.gather(*batches, return_exceptions=True)
        self._lost.clear()
        self.buffer.clear()

    async def _collect(self, iteration: int) -> Batch:
        """Has an iteration's groups drawn and scored; groups that fail are dropped and counted."""
        began = time.monotonic()
        count, state = self._config.rollout.prompts_per_iteration, self._position.state
        first = state.next_group + (iteration - state.iteration) * count
        strength = self._guidance.strength(iteration)
        orders = [self._prompts.task(first + i, iteration, strength) for i in range(count)]
        cut = count - self._tail.groups
        tasks = [
            asyncio.ensure_future(self._fill(order, () if i < cut else self._tail.parts))
            for i, order in enumerate(orders)
        ]
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

    async def _fill(self, task: GroupTask, parts: Sequence[tuple[int, int]]) -> str | None:
        """Puts a group into the buffer, once there is room for it; returns why it was dropped, or None."""
        await self.buffer.admit(task)
        try:
            group = await self._draw_and_score(task, parts)
        except RewardError as error:
            # Its requests have been retried on other servers already; drawing the group again would repeat them.
            self._failures.note(error)
            reason = str(error)
        except (LostActorError, WeightsMissingError) as error:
            reason = str(error)
        else:
            await self.buffer.put(group)
            return None
        self._lost.add(task.group_id)
        await self.buffer.drop(task)
        return reason

    async def _draw_and_score(self, task: GroupTask, parts: Sequence[tuple[int, int]]) -> ScoredGroup:
        info, latents, payload = await self._rollouts.draw(task, parts)
        prompts = [task.prompt] * self._config.rollout.group_size
        rewards = self._config.rewards
        scores, seconds = await self._rollouts.scores(latents, prompts, rewards.deadline_s, rewards.optional)
        return ScoredGroup(info, latents, payload, scores, seconds)

"""The trajectory buffer: a Ray actor with references to finished groups, and the learners' only way to work.

It holds references, never arrays: the arrays are return values of calls that the orchestrator made, so the
orchestrator owns them and they outlive the rollout actor that drew them. An iteration is the transaction: groups
leave the buffer when every rank has acknowledged the plan that they belong to.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

from core.config import RunConfig
from core.records import Array, UpdatePlan, UpdateReport
from learners.batching import plan_updates


@dataclass(frozen=True, kw_only=True)
class BufferedGroup:
    """A scored group that waits for its update.

    Attributes:
        group_id: ordinal of the group.
        payload: one-element list around the reference, which keeps Ray from fetching it on the way.
        payload_bytes: size of the arrays behind it.
        rows: its trained transitions.
        advantages: float32 ``[components, group, num_steps]``.
        samples: int64, samples to train on.
        iteration: that it was drawn for, from 0.
        fingerprint: of the sampler that drew it.
    """

    group_id: int
    payload: list[Any]
    payload_bytes: int
    rows: int
    advantages: Array
    samples: Array
    iteration: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """What the orchestrator hears while it waits for the learner group.

    Attributes:
        report: of the awaited iteration, or None while it is under way.
        failure: why the group gave up, or None.
        generation: how often the group has started.
    """

    report: UpdateReport | None
    failure: str | None
    generation: int


class TrajectoryBuffer:
    """See the module; one event loop, so methods interleave only where they await."""

    def __init__(self, config: RunConfig, capacity_bytes: int) -> None:
        self._config = config
        self._capacity = capacity_bytes
        self._groups: dict[int, BufferedGroup] = {}
        self._changed = asyncio.Condition()
        self._plan: UpdatePlan | None = None
        self._plan_groups: list[int] = []
        self._leased: set[int] = set()
        self._acknowledged: dict[int, UpdateReport] = {}
        self._report: UpdateReport | None = None
        self._failure: str | None = None
        self._generation = 0
        self._world_size = 0
        self._joined: set[int] = set()
        self._resume: str | None = None
        self._version = 0

    def __repr__(self) -> str:
        return "trajectory-buffer"

    async def offer(self, group: BufferedGroup) -> int:
        """Takes a group, once there is room for it.

        Returns:
            Bytes now referred to.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._groups or self._bytes() + group.payload_bytes <= self._capacity
            )
            self._groups[group.group_id] = group
            return self._bytes()

    async def submit(self, plan: UpdatePlan, group_ids: list[int]) -> None:
        """Orders an update on groups that the buffer holds."""
        async with self._changed:
            self._plan, self._plan_groups = plan, group_ids
            self._leased.clear()
            self._acknowledged.clear()
            self._report = None
            self._changed.notify_all()

    async def state(self, iteration: int, timeout_s: float) -> LearnerState:
        """Waits until the iteration is reported or the group fails or restarts, at most ``timeout_s``."""
        generation = self._generation

        def settled() -> bool:
            reported = self._report is not None and self._report.iteration == iteration
            return reported or self._failure is not None or self._generation != generation

        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(settled), timeout_s)
            report = self._report if self._report is not None and self._report.iteration == iteration else None
            return LearnerState(report=report, failure=self._failure, generation=self._generation)

    async def set_checkpoint(self, folder: str | None, version: int) -> None:
        """Tells from where a restarting learner group resumes, and which policy version that is."""
        self._resume, self._version = folder, version

    async def join(self, rank: int, world_size: int) -> str | None:
        """Called by every rank when it starts; answers with the checkpoint to load, or None."""
        async with self._changed:
            if rank in self._joined or world_size != self._world_size:
                self._joined.clear()
            self._joined.add(rank)
            self._world_size = world_size
            # Whatever an earlier generation had under way is void: it resumes from the checkpoint.
            self._plan, self._report = None, None
            return self._resume

    async def version(self) -> int:
        """Policy version of the checkpoint that :meth:`join` answered with."""
        return self._version

    async def learner_ready(self, world_size: int) -> None:
        """Called by rank 0 once the group can take plans."""
        async with self._changed:
            self._generation += 1
            self._world_size = world_size
            self._groups.clear()
            self._changed.notify_all()

    async def generation(self) -> int:
        """How often the learner group has started."""
        return self._generation

    async def lease(self, rank: int) -> tuple[UpdatePlan, dict[str, Any]]:
        """The next plan, with what this rank needs of it; waits for one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._plan is not None and rank not in self._leased)
            assert self._plan is not None
            self._leased.add(rank)
            groups = [self._groups[i] for i in self._plan_groups]
            rows = [group.rows for group in groups]
            needed = {
                batch.group
                for shares in plan_updates(
                    rows,
                    self._config.objective.updates_per_iteration,
                    self._config.pools.learner.rows_per_micro_batch,
                    self._world_size,
                )
                for batch in shares[rank]
            }
            return self._plan, {
                "rows_per_group": rows,
                "groups": {
                    i: {
                        "payload_ref": groups[i].payload[0],
                        "advantages": groups[i].advantages,
                        "samples": groups[i].samples,
                        "iteration": groups[i].iteration,
                        "fingerprint": groups[i].fingerprint,
                    }
                    for i in sorted(needed)
                },
            }

    async def acknowledge(self, rank: int, report: UpdateReport) -> None:
        """Called by every rank when a plan is done; the last one completes the transaction."""
        async with self._changed:
            self._acknowledged[rank] = report
            if len(self._acknowledged) == self._world_size:
                self._report = self._acknowledged[0]
                for group_id in self._plan_groups:
                    self._groups.pop(group_id, None)
                self._plan, self._plan_groups = None, []
                self._changed.notify_all()

    async def fail(self, reason: str) -> None:
        """Called by a rank that cannot go on and should not be restarted."""
        async with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    def _bytes(self) -> int:
        return sum(group.payload_bytes for group in self._groups.values())

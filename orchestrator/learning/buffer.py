"""The trajectory buffer: a Ray actor with references to finished groups, and the learners' only way to work.

It holds references, never arrays: the arrays are return values of calls that the orchestrator made, so the
orchestrator owns them and they outlive the rollout actor that drew them. An iteration is the transaction: its groups
leave the buffer when every rank has acknowledged the plan that they belong to.

A learner group that starts joins with a name of its own, the *attempt*. Whatever an earlier attempt still asks is
refused, also calls that have been waiting here since before it died; and a plan is taken only from an orchestrator
that knows of the attempt, because the group may have gone back to a checkpoint in the meantime. A buffer that was
restarted has forgotten everything and lets nobody join before it was told where to resume from.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

from euphonium.config import RunConfig
from euphonium.errors import LostActorError
from euphonium.wire.records import Array, UpdatePlan, UpdateReport
from learners.policy.batching import plan_updates


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
        policy_version: of the weights that drew it.
        fingerprint: of the sampler that drew it.
    """

    group_id: int
    payload: list[Any]
    payload_bytes: int
    rows: int
    advantages: Array
    samples: Array
    iteration: int
    policy_version: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """What the orchestrator hears while it waits for the learner group.

    Attributes:
        report: of the awaited iteration, or None while it is under way.
        failure: why the group gave up, or None.
        generation: how often the group has joined.
        ready: whether it can take plans.
        resumed: policy version of the checkpoint from which it started last.
    """

    report: UpdateReport | None
    failure: str | None
    generation: int
    ready: bool
    resumed: int


class TrajectoryBuffer:
    """See the module; one event loop, so methods interleave only where they await."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._changed = asyncio.Condition()
        self._plan: UpdatePlan | None = None
        self._groups: list[BufferedGroup] = []
        self._leased: set[int] = set()
        self._acknowledged: dict[int, UpdateReport] = {}
        self._report: UpdateReport | None = None
        self._failure: str | None = None
        self._generation = 0
        self._ready = False
        self._attempt = ""
        self._world_size = 0
        self._checkpoint: tuple[str | None, int] | None = None
        self._resumed: tuple[str | None, int] = None, 0

    def __repr__(self) -> str:
        return "trajectory-buffer"

    # --- the orchestrator's side --------------------------------------------------------------------------------

    async def set_checkpoint(self, folder: str | None, version: int) -> None:
        """Tells from where a starting learner group resumes, and which policy version that is."""
        async with self._changed:
            self._checkpoint = folder, version
            self._changed.notify_all()

    async def submit(self, plan: UpdatePlan, groups: list[BufferedGroup], generation: int) -> bool:
        """Orders an update.

        Returns:
            Whether it was taken; not if the learner group has started anew since ``generation``.
        """
        async with self._changed:
            if generation != self._generation or not self._ready:
                return False
            self._plan, self._groups = plan, groups
            self._leased.clear()
            self._acknowledged.clear()
            self._report = None
            self._changed.notify_all()
            return True

    async def state(self, iteration: int, generation: int, timeout_s: float) -> LearnerState:
        """Waits until the iteration is reported or the group fails or has restarted; or for the timeout."""

        def settled() -> bool:
            reported = self._report is not None and self._report.iteration == iteration
            return reported or self._failure is not None or (self._ready and self._generation != generation)

        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(settled), timeout_s)
            report = self._report if self._report is not None and self._report.iteration == iteration else None
            return LearnerState(
                report=report, failure=self._failure, generation=self._generation, ready=self._ready,
                resumed=self._resumed[1],
            )  # fmt: skip

    # --- the learners' side ------------------------------------------------------------------------------------

    async def join(self, attempt: str, world_size: int) -> tuple[str | None, int]:
        """Called by every rank when it starts.

        Returns:
            The checkpoint to load, or None, and its policy version; the same for all ranks of an attempt.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._checkpoint is not None)
            assert self._checkpoint is not None
            if attempt != self._attempt:
                # Whatever an earlier attempt had under way is void: this one resumes from the checkpoint.
                self._attempt, self._world_size, self._resumed = attempt, world_size, self._checkpoint
                self._plan, self._report, self._groups = None, None, []
                self._generation, self._ready = self._generation + 1, False
                self._changed.notify_all()
            return self._resumed

    async def learner_ready(self, attempt: str) -> None:
        """Called by rank 0 once the group can take plans."""
        async with self._changed:
            self._must_be_current(attempt)
            self._ready = True
            self._changed.notify_all()

    async def lease(self, rank: int, attempt: str) -> tuple[UpdatePlan, dict[str, Any]]:
        """The next plan, with what this rank needs of it; waits for one.

        Raises:
            LostActorError: another attempt has joined since.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: attempt != self._attempt or (self._plan is not None and rank not in self._leased)
            )
            self._must_be_current(attempt)
            assert self._plan is not None
            self._leased.add(rank)
            rows = [group.rows for group in self._groups]
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
                        "payload_ref": self._groups[i].payload[0],
                        "advantages": self._groups[i].advantages,
                        "samples": self._groups[i].samples,
                        "iteration": self._groups[i].iteration,
                        "on_policy": self._groups[i].policy_version == self._plan.iteration - 1,
                        "fingerprint": self._groups[i].fingerprint,
                    }
                    for i in sorted(needed)
                },
            }

    async def acknowledge(self, rank: int, attempt: str, report: UpdateReport) -> None:
        """Called by every rank when a plan is done; the last one completes the transaction.

        Raises:
            LostActorError: another attempt has joined since.
        """
        async with self._changed:
            self._must_be_current(attempt)
            self._acknowledged[rank] = report
            if len(self._acknowledged) == self._world_size:
                self._report = self._acknowledged[0]
                self._plan, self._groups = None, []
                self._changed.notify_all()

    async def fail(self, attempt: str, reason: str) -> None:
        """Called by a rank that cannot go on and should not be restarted."""
        async with self._changed:
            if attempt == self._attempt:
                self._failure = self._failure or reason
                self._changed.notify_all()

    def _must_be_current(self, attempt: str) -> None:
        if attempt != self._attempt:
            raise LostActorError("another learner group has taken this one's place")

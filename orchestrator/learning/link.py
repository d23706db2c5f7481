"""The run loop's line to the learner group: plans one way, reports the other, through the trajectory buffer.

The buffer counts how often a learner group has joined it, the *generation*; a plan that was meant for an earlier
generation than the present one is refused, and the run loop learns of the restart by that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, TrainingError
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import UpdatePlan, UpdateReport
from euphonium.wire.weights.store import WeightStore
from orchestrator.commands.launch import beside_the_driver
from orchestrator.learning.buffer import BufferedGroup, LearnerState, TrajectoryBuffer
from orchestrator.learning.group import LearnerGroup
from orchestrator.report.tracking import Progress

BUFFER, STORE = "trajectory-buffer", "weight-store"
RECOVERY_TIMEOUT_S = 120.0


class LearnerRestartedError(TrainingError):
    """The learner group died and is back, at the last checkpoint."""


class LearnerLink:
    """See the module.

    Attributes:
        group: the learner group, or None before it was started.
        turn: to be held while the group works on plans that belong together.
    """

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        self._config = config
        self._pool = config.pools.learner
        self._progress = progress
        self._generation = 0
        self.group: LearnerGroup | None = None
        self.turn = asyncio.Lock()

    # --- start and end ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Makes the buffer and the weight store."""
        import ray

        # Both may be restarted by Ray; what they forget is told or published again.
        options = beside_the_driver()
        self._store = ray.remote(WeightStore).options(name=STORE, **options).remote()
        self._buffer = ray.remote(TrajectoryBuffer).options(name=BUFFER, **options).remote(self._config)

    def start(self, group: LearnerGroup) -> None:
        """Starts a learner group; returns at once."""
        self.group = group
        group.start()

    async def replaced(self) -> None:
        """Waits until the group that was started in another's place can take plans.

        Raises:
            TrainingError: it failed, or did not come in time.
            LearnerRestartedError: the buffer died over it.
        """
        await self._joined(self._generation)

    async def joined(self, checkpoint: str | None, iteration: int) -> int:
        """Waits until a group that starts, or that died, can take plans; also if the buffer dies over it.

        Args:
            checkpoint: folder from which a group resumes that has not joined yet.
            iteration: of that checkpoint.

        Returns:
            The iteration from which the group goes on.

        Raises:
            TrainingError: the group or the buffer does not come back.
        """
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        known = self._generation
        while True:
            try:
                # A buffer that was restarted counts from 0 and waits to be told where the run resumes from.
                state: LearnerState = await self._ask("state", -1, -1, 0.0)
                if state.generation < known:
                    known = 0
                await self.resume_from(checkpoint, iteration)
                return (await self._joined(known)).resumed
            except LearnerRestartedError:
                if time.monotonic() > deadline:
                    raise TrainingError("the trajectory buffer does not come back") from None
                await asyncio.sleep(1.0)

    @property
    def has_joined(self) -> bool:
        """Whether a learner group has ever been able to take plans."""
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
        """Notes that the group has done its last plan."""
        assert self.group is not None
        self.group.dismiss()

    def join(self, timeout_s: float) -> None:
        """Waits for the group to end, after a plan that says stop."""
        assert self.group is not None
        self.group.join(timeout_s)

    async def _joined(self, after: int) -> LearnerState:
        """Waits until the group that joined after a generation can take plans."""
        deadline = time.monotonic() + self._pool.start_timeout_s
        while True:
            state: LearnerState = await self._ask("state", -1, after, 2.0)
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

    # --- plans --------------------------------------------------------------------------------------------------

    async def resume_from(self, checkpoint: str | None, iteration: int) -> None:
        """Tells from which checkpoint, of which iteration, a starting learner group resumes.

        Raises:
            LearnerRestartedError: the buffer died.
        """
        await self._ask("set_checkpoint", checkpoint, iteration)

    async def carry_out(self, plan: UpdatePlan, groups: Sequence[BufferedGroup] = ()) -> UpdateReport:
        """Has the group carry out a plan, and waits for its report.

        Raises:
            LearnerRestartedError: the group has gone back to the last checkpoint.
            TrainingError: it failed, or took too long.
        """
        if not await self._ask("submit", plan, list(groups), self._generation):
            raise LearnerRestartedError
        deadline = time.monotonic() + self._pool.update_timeout_s
        while True:
            state: LearnerState = await self._ask("state", plan.iteration, self._generation, 5.0)
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation != self._generation:
                raise LearnerRestartedError
            if state.report is not None:
                return state.report
            self.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not finish iteration {plan.iteration} within "
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
                    averages = self._config.optimizer.averages
                    await self.carry_out(
                        UpdatePlan(iteration=version, num_groups=0, publish=True, publish_average=averages)
                    )
                    return
            except LostActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(1.0)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Calls the buffer; a buffer that died has forgotten the learner group, which then starts anew."""
        try:
            return await awaited(getattr(self._buffer, method).remote(*arguments), None, "the trajectory buffer")
        except LostActorError as error:
            raise LearnerRestartedError(str(error)) from error

"""The run loop: ties the roles together, one iteration as one transaction.

    prompts -> rollout actors <-> PRM servers
                    | latents (reference)            | transitions (reference)
                    v                                v
               ORM servers -> advantages -> trajectory buffer <- lease -- learner group (ZeRO-3)
                                                                              |
               rollout actors <------ weight store <------ publish -----------+

Drawing and training are two loops that meet in ``_ahead``, the batches drawn for coming iterations: as many are under
way as ``rollout.max_staleness`` allows (orchestrator/staleness.py), while the consumer takes them in order, submits
them to the learner group and waits for its report. Every order to a rollout actor says which policy version it takes
at least; actors fetch weights themselves, between groups.

The loop waits for: rollout and scoring of all groups of the iteration (each with a deadline, retried elsewhere,
then dropped and counted); the learner group's report (deadline, or its failure, or its restart, which rewinds the
run to the checkpoint that it resumed from). It runs on asyncio in the driver; Ray calls are awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from actors.rollout import RolloutActor
from core.config import RunConfig, dump_config
from core.deadlines import describe, remote_error
from core.errors import (
    EuphoniumError,
    LostActorError,
    PreflightError,
    RewardError,
    TrainingError,
    WeightsMissingError,
)
from core.records import Array, GroupInfo, GroupTask, RolloutContext, UpdatePlan, UpdateReport
from core.servers import ServerPool
from dynamics import GroupRewards, group_advantages
from learners.prm_refresh import weighted_total
from orchestrator.advice import advice
from orchestrator.buffer import BufferedGroup, LearnerState, TrajectoryBuffer
from orchestrator.checkpoints import Checkpoint, CheckpointStore, RunState
from orchestrator.control import CONTROL, ControlDesk
from orchestrator.evaluation import Evaluation, evaluation_set
from orchestrator.learner_group import LearnerGroup
from orchestrator.pools import ActorPool, Member, free_resources, wait_ready
from orchestrator.prm_refresh import RefreshHandle
from orchestrator.prompts import PromptStream, read_prompts
from orchestrator.staleness import Bounds, Held, may_draw, may_start, staleness
from orchestrator.statistics import RewardFailures, RewardWatch, rollout_statistics
from orchestrator.tracking import Progress, Tracker, read_metrics
from orchestrator.weight_store import WeightStore
from reward_servers.orm import OrmActor
from reward_servers.prm import PrmActor

log = logging.getLogger(__name__)

_T = TypeVar("_T")
BUFFER, STORE = "trajectory-buffer", "weight-store"
POLL_EVERY_S = 1.0
RECOVERY_TIMEOUT_S = 120.0
LEFTOVERS_TIMEOUT_S = 60.0
MEGABYTE = 1 << 20


class StopRequestedError(Exception):
    """SIGTERM or SIGINT: leave at the next point from which the run can go on."""


class LearnerRestartedError(TrainingError):
    """The learner group died and is back, at the last checkpoint."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards; ``latents`` and ``payload`` are references to final latents and transitions."""

    info: GroupInfo
    latents: Any
    payload: Any
    scores: dict[str, Array]
    scoring_s: float


@dataclass(frozen=True)
class Batch:
    """The groups of one iteration.

    Attributes:
        groups: those that were drawn and scored.
        dropped: number of those that were given up.
        next_group: ordinal of the first group of the iteration after.
        seconds: from the first order to the last score.
    """

    groups: list[ScoredGroup]
    dropped: int
    next_group: int
    seconds: float


class Run:
    """One training run in a running Ray cluster."""

    def __init__(self, config: RunConfig, namespace: str, resume: Checkpoint | None) -> None:
        self.config = config
        self.namespace = namespace
        self.checkpoint = resume
        self.state = resume.state if resume else self._fresh_state()
        self.prompts = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
        keep = config.checkpoint
        self.checkpoints = CheckpointStore(config.run_dir / "checkpoints", keep.keep_last, keep.keep_every)
        self.tracker = Tracker(config, self.state.iteration)
        self.progress = Progress(config.iterations, self.state.iteration)
        self.pools: dict[str, ActorPool] = {}
        self._stop: asyncio.Event = asyncio.Event()
        self._generation = 0
        names = [reward.name for reward in config.rewards.outcome]
        self.judges = ServerPool("orm", lambda: self.pools["orm"].reachable_handles, config.rewards, rewards=names)
        self.failures = RewardFailures(config.rewards)
        self.watch = RewardWatch(config.rewards.watch, read_metrics(self.tracker.path))
        self.refresh: RefreshHandle | None = None
        self._scoring: set[asyncio.Future[Any]] = set()
        self._epoch = 0
        self._states = {self.state.iteration: self.state}
        self._ahead: dict[int, asyncio.Task[Batch]] = {}
        # Groups begun and not trained on, with their size once it is known.
        self._held: dict[int, int] = {}
        self._largest = 0
        self._room = asyncio.Condition()
        self._learner_turn = asyncio.Lock()
        self._learner_size = config.pools.learner.num_workers
        self._learner_busy = 0.0
        self._committing: asyncio.Task[None] | None = None
        self._commit_s = 0.0
        self._poller: asyncio.Task[None] | None = None
        self._phase = "starting roles"
        self._last = ""

    def _fresh_state(self) -> RunState:
        return RunState(iteration=0, next_group=0, world_size=self.config.pools.learner.num_workers)

    # --- start and end -------------------------------------------------------------------------------------

    async def execute(self) -> None:
        """Starts all roles, trains to the end or to a stop, and leaves a checkpoint."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        began = time.monotonic()
        try:
            await self._start_roles()
            self.progress.say(f"all roles are up after {time.monotonic() - began:.0f} s")
            await self._train()
        except StopRequestedError:
            await self._save_and_stop()
        finally:
            if self._poller is not None:
                self._poller.cancel()
            for pool in self.pools.values():
                pool.stop_watching()
            await self._forget_ahead()
            self.progress.close()
            self.tracker.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _start_roles(self) -> None:
        import ray

        config, pools = self.config, self.config.pools
        await self._namespace_is_free()
        # Both may be restarted by Ray; what they forget is told or published again.
        always = {"num_cpus": 0, "max_restarts": -1}
        self.store = ray.remote(WeightStore).options(name=STORE, **always).remote()
        self.buffer = ray.remote(TrajectoryBuffer).options(name=BUFFER, **always).remote(config)
        self.desk = ray.remote(ControlDesk).options(name=CONTROL, **always).remote()
        await self._buffer("set_checkpoint", self._checkpoint_path(), self.state.iteration)
        self.learners = self.learner_group()
        self.learners.start()
        for role, make in self.actors().items():
            self._add_pool(role, make)
        self._enter("starting roles")
        self._poller = asyncio.ensure_future(self._poll_desk())
        await self._guard(wait_ready(list(self.pools.values()), pools.start_timeout_s, self.progress.say))
        for pool in self.pools.values():
            pool.watch()
        await self._guard(self._learner_started(0))
        await self._guard(self._restore_prm())
        if self.tracker.endpoint is not None:
            self.progress.say(f"metrics at {self.tracker.endpoint.address}")

    def actors(self) -> dict[str, Callable[[int], tuple[type, tuple[Any, ...]]]]:
        """Class and arguments of the actors of every role, by their index in the pool."""
        config = self.config
        roles: dict[str, Callable[[int], tuple[type, tuple[Any, ...]]]] = {}
        if config.rewards.process is not None:
            roles["prm"] = lambda i: (PrmActor, (i, config))
        roles["orm"] = lambda i: (OrmActor, (i, config))
        roles["rollout"] = lambda i: (RolloutActor, (i, config, STORE))
        return roles

    def learner_group(self) -> LearnerGroup:
        """A learner group of the configured size, not yet started."""
        return LearnerGroup(self.config, self.namespace, BUFFER, STORE)

    async def _namespace_is_free(self) -> None:
        """Waits for what a run of this name that was killed a moment ago has left; Ray takes it away.

        Raises:
            PreflightError: a run of this name is running in this cluster.
        """
        import ray

        deadline = time.monotonic() + LEFTOVERS_TIMEOUT_S
        while names := ray.util.list_named_actors():
            if time.monotonic() > deadline:
                raise PreflightError(
                    f"a run named {self.config.name} is running in this cluster ({', '.join(sorted(names))}): "
                    "stop it, or take another name=..."
                )
            await asyncio.sleep(0.5)
            if self._stop.is_set():
                raise StopRequestedError

    def _add_pool(self, role: str, make: Callable[[int], tuple[type, tuple[Any, ...]]]) -> None:
        pools = self.config.pools
        self.pools[role] = ActorPool(
            role,
            getattr(pools, role),
            make,
            start_timeout_s=pools.start_timeout_s,
            rejoin_timeout_s=pools.rejoin_timeout_s,
            say=self.progress.say,
        )

    async def _learner_started(self, after: int) -> LearnerState:
        """Waits until the learner group that joined after a generation can take plans."""
        deadline = time.monotonic() + self.config.pools.learner.start_timeout_s
        while True:
            state: LearnerState = await self._buffer("state", -1, after, 2.0)
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation > after and state.ready:
                self._generation = state.generation
                return state
            self.learners.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not start within {self.config.pools.learner.start_timeout_s:.0f} s; see "
                    "the Train tab of the Ray dashboard, or raise pools.learner.start_timeout_s"
                )

    async def _train(self) -> None:
        evaluated = self.state.iteration > 0
        while self.state.iteration < self.config.iterations:
            try:
                if not evaluated:
                    values = await self._guard(self._evaluate(0))
                    self._record({"iteration": 0, "policy_version": 0, **values})
                    evaluated = True
                if self._learner_size != self.config.pools.learner.num_workers:
                    await self._resize_learners(self._learner_size)
                await self._iterate()
            except LearnerRestartedError:
                await self._rewind()
        await self._committed()
        self.learners.join(60)
        self._export()
        self.progress.summary(read_metrics(self.tracker.path))
        self.progress.say(f"before and after: {self.config.run_dir / 'samples' / 'before_after.png'}")

    async def _save_and_stop(self) -> None:
        """Checkpoints where the run stands, after a signal."""
        done = self.state.iteration
        await self._forget_ahead()
        if not self.learners_usable():
            self.progress.say("stopped before training began; nothing to save")
            return
        await self._committed()
        if self.checkpoint is None or self.checkpoint.state.iteration != done:
            self.progress.say(f"stopping: writing a checkpoint of iteration {done}")
            try:
                await self._checkpoint_now(stop=True)
            except LearnerRestartedError:
                self.progress.say("the learner group died over it: the run goes on from the checkpoint before")
        self.progress.say(
            f"stopped after iteration {done}; go on with: euphonium train {self.config.run_dir}/config.resolved.yaml "
            "resume=auto"
        )

    async def _checkpoint_now(self, *, stop: bool) -> None:
        """Writes a checkpoint of the last iteration; with ``stop``, the learner group ends after it."""
        done = self.state.iteration
        folder = self.checkpoints.begin(done)
        plan = UpdatePlan(iteration=done, num_groups=0, checkpoint=str(folder.resolve()), stop=stop)
        await self._submit(plan, [])
        await self._report(done)
        await self._commit_later(folder)
        await self._committed()

    def learners_usable(self) -> bool:
        """Whether the learner group has started and not ended."""
        try:
            self.learners.check()
        except (TrainingError, AttributeError):
            return False
        return self._generation > 0

    # --- one iteration --------------------------------------------------------------------------------------

    async def _iterate(self) -> None:
        config = self.config
        began = time.monotonic()
        iteration = self.state.iteration + 1
        self._enter(f"iteration {iteration}: rollout")
        self._draw_ahead()
        batch = await self._guard(self._ahead[iteration - 1])
        groups = batch.groups
        record: dict[str, float] = {"iteration": iteration, "policy_version": iteration}
        buffered, statistics = self._advantages(groups)
        record |= statistics
        record |= {"rollout/dropped_groups": batch.dropped, "time/rollout_s": batch.seconds}
        record |= self.failures.take() | self.watch.update(iteration, statistics, self.progress.say)
        held = self._held_now()
        record |= {"buffer/groups": held.groups, "buffer/bytes": held.nbytes}
        lags = [staleness(iteration - 1, group.info.policy_version) for group in groups]
        record |= {"staleness/mean": float(np.mean(lags)), "staleness/max": float(max(lags))}

        last = iteration == config.iterations
        evaluates = last or iteration % config.evaluation.every == 0
        saves = last or iteration % config.checkpoint.every == 0
        folder = self.checkpoints.begin(iteration) if saves else None
        plan = UpdatePlan(
            iteration=iteration,
            num_groups=len(buffered),
            publish_average=evaluates and config.optimizer.ema_decay > 0,
            checkpoint=str(folder.resolve()) if folder is not None else None,
            stop=last,
        )
        self._enter(f"iteration {iteration}: update")
        # From here to the report the transaction must not be cut in two.
        async with self._learner_turn:
            await self._submit(plan, buffered)
            report = await self._report(iteration)
        if last:
            self.learners.dismiss()
        record |= report.metrics
        pulls = max(group.info.seconds["weights"] for group in groups)
        record["time/weight_sync_s"] = report.metrics["time/publish_s"] + pulls
        record["time/iteration_s"] = time.monotonic() - began
        record |= await self._refresh_prm(iteration, groups, folder)
        self.state = RunState(
            iteration=iteration, next_group=batch.next_group, world_size=config.pools.learner.num_workers
        )
        del self._ahead[iteration - 1]
        await self._let_go(batch.next_group)
        record |= self._load(report.metrics, record["time/iteration_s"])
        if folder is not None:
            await self._commit_later(folder)
        if self._commit_s:
            record["time/commit_s"], self._commit_s = self._commit_s, 0.0
        try:
            if evaluates:
                if not last and config.rollout.max_staleness > 0:
                    self._draw_ahead()
                record |= await self._guard(self._evaluate(iteration))
        finally:
            # The update is done and checkpointed: it is on record even if the evaluation was cut short.
            self._record(record)
        if evaluates and (line := self._advice(record)):
            self.progress.say(line)
        if self._stop.is_set() and not last:
            raise StopRequestedError

    def _draw_ahead(self) -> None:
        """Begins the batches that may be begun."""
        version = self.state.iteration
        for iteration in range(version, self.config.iterations):
            if not may_start(iteration, version, self.config.rollout.max_staleness):
                break
            if iteration not in self._ahead:
                self._ahead[iteration] = asyncio.ensure_future(self._collect(iteration))

    async def _forget_ahead(self) -> None:
        """Gives up what was drawn ahead."""
        batches = list(self._ahead.values())
        self._ahead.clear()
        for batch in batches:
            batch.cancel()
        await asyncio.gather(*batches, return_exceptions=True)
        self._held.clear()

    async def _collect(self, iteration: int) -> Batch:
        """Draws and scores an iteration's groups; those whose rewards cannot be had are dropped and counted."""
        began = time.monotonic()
        count = self.config.rollout.prompts_per_iteration
        first = self.state.next_group + (iteration - self.state.iteration) * count
        tasks = [asyncio.ensure_future(self._admitted(self.prompts.task(first + i, iteration))) for i in range(count)]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        groups = [group for group in results if isinstance(group, ScoredGroup)]
        lost = [reason for reason in results if isinstance(reason, str)]
        if len(lost) > self.config.rewards.max_dropped_fraction * count or not groups:
            raise RewardError(
                f"{len(lost)} of {count} groups were lost in one iteration (rewards.max_dropped_fraction is "
                f"{self.config.rewards.max_dropped_fraction}). The last reason: {lost[-1]}"
            )
        return Batch(groups, len(lost), first + count, time.monotonic() - began)

    async def _admitted(self, task: GroupTask) -> ScoredGroup | str:
        """Draws and scores a group once there is room for it."""
        async with self._room:
            await self._room.wait_for(
                lambda: may_draw(task.iteration, self.state.iteration, self._bounds(), self._held_now())
            )
            self._held[task.group_id] = 0
        result = await self._attempt(task)
        async with self._room:
            if isinstance(result, ScoredGroup):
                self._held[task.group_id] = result.info.payload_bytes
                self._largest = max(self._largest, result.info.payload_bytes)
            else:
                self._held.pop(task.group_id, None)
            self._room.notify_all()
        return result

    def _bounds(self) -> Bounds:
        rollout = self.config.rollout
        every = (rollout.max_staleness + 1) * rollout.prompts_per_iteration
        return Bounds(
            max_staleness=rollout.max_staleness,
            groups=rollout.buffer_groups or every,
            nbytes=int(rollout.buffer_mb * MEGABYTE),
        )

    def _held_now(self) -> Held:
        sizes = [size or self._largest for size in self._held.values()]
        return Held(groups=len(sizes), nbytes=sum(sizes), each=self._largest)

    async def _let_go(self, next_group: int) -> None:
        """Makes room: everything before an ordinal has been trained on."""
        async with self._room:
            self._held = {group: size for group, size in self._held.items() if group >= next_group}
            self._room.notify_all()

    async def _attempt(self, task: GroupTask) -> ScoredGroup | str:
        """A scored group, or why it was given up."""
        reason = ""
        for attempt in range(self.config.rewards.attempts):
            if attempt:
                log.warning("group %d (%s): trying again: %s", task.group_id, task.prompt, reason)
                await asyncio.sleep(min(2.0**attempt, 15.0))
            try:
                return await self._draw_and_score(task)
            except RewardError as error:
                # Every request has been tried on all servers; the same group again would ask them the same.
                self.failures.note(error)
                return str(error)
            except LostActorError as error:
                reason = str(error)
            except WeightsMissingError as error:
                reason = str(error)
                await self._republish()
        return reason

    async def _draw_and_score(self, task: GroupTask) -> ScoredGroup:
        deadline, what = self.config.rollout.deadline_s, f"group {task.group_id} from the rollout pool"
        if "prm" in self.pools:
            await self.pools["prm"].manned()
        async with self.pools["rollout"].exclusive(priority=task.group_id) as member:
            # The driver makes the call, so it owns the three results: they outlive the actor.
            generate = member.handle.generate.options(num_returns=3)
            info_ref, latents, payload = generate.remote(task, self._context())
            info: GroupInfo = await self._answer(self.pools["rollout"], member, info_ref, deadline, what, kill=True)
        prompts = [task.prompt] * self.config.rollout.group_size
        scores, seconds = await self._score(latents, prompts)
        return ScoredGroup(info, latents, payload, scores, seconds)

    async def _score(self, latents: Any, prompts: Sequence[str]) -> tuple[dict[str, Array], float]:
        """Outcome rewards of a reference to latents, and the seconds that they took.

        Raises:
            RewardError: no server answered with finite numbers.
        """
        timeout = self.config.rewards.deadline_s
        scores, seconds = await self._judged(lambda server: server.score.remote(latents, prompts, timeout), timeout)
        return scores, seconds

    async def _scored(self) -> None:
        """Waits until nobody may still ask an ORM server that has left the pool."""
        await self.pools["rollout"].quiet()
        await asyncio.gather(*self._scoring, return_exceptions=True)

    def _context(self, kind: str = "policy") -> RolloutContext:
        """What rollout actors work with from now on."""
        return RolloutContext(
            version=self.state.iteration,
            epoch=self._epoch,
            kind=kind,
            prm_servers=self.pools["prm"].reachable if "prm" in self.pools else (),
            orm_servers=self.pools["orm"].reachable,
        )

    async def _answer(
        self, pool: ActorPool, member: Member, ref: Any, timeout_s: float, what: str, *, kill: bool = False
    ) -> Any:
        """Awaits a member's answer; one that dies, or with ``kill`` one that hangs, gets no work until it is back."""
        try:
            return await _awaited(ref, timeout_s, what)
        except _LateError:
            if kill:
                pool.lose(member, kill=True)
            raise
        except LostActorError:
            pool.lose(member)
            raise

    def _advantages(self, groups: Sequence[ScoredGroup]) -> tuple[list[BufferedGroup], dict[str, float]]:
        """Turns rewards into advantages; global scopes need all groups of the iteration at once."""
        rewards = [
            GroupRewards(
                {name: torch.tensor(values) for name, values in group.scores.items()},
                None if group.info.process_rewards is None else torch.tensor(group.info.process_rewards),
            )
            for group in groups
        ]
        results = group_advantages(rewards, self.config.advantage_rule())
        steps = self.config.sampler.num_steps
        buffered = [
            BufferedGroup(
                group_id=group.info.task.group_id,
                payload=[group.payload],
                payload_bytes=group.info.payload_bytes,
                rows=len(result.samples) * group.info.transitions,
                advantages=result.values.expand(-1, -1, steps).numpy(),
                samples=np.array(result.samples, dtype=np.int64),
                iteration=group.info.task.iteration,
                policy_version=group.info.policy_version,
                fingerprint=group.info.fingerprint,
            )
            for group, result in zip(groups, results, strict=True)
        ]
        scoring = {"time/scoring_s": sum(group.scoring_s for group in groups)}
        infos, scores = [group.info for group in groups], [group.scores for group in groups]
        return buffered, scoring | rollout_statistics(self.config, infos, scores, results)

    # --- learner, weights, checkpoints --------------------------------------------------------------------

    async def _buffer(self, method: str, *arguments: Any) -> Any:
        """Calls the buffer; a buffer that died has forgotten the learner group, which then starts anew."""
        import ray

        try:
            return await _unwrap(getattr(self.buffer, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise remote_error(error, "the trajectory buffer") from error
        except ray.exceptions.RayError as error:
            raise LearnerRestartedError(describe(error)) from error

    async def _submit(self, plan: UpdatePlan, groups: list[BufferedGroup]) -> None:
        if not await self._buffer("submit", plan, groups, self._generation):
            raise LearnerRestartedError

    async def _report(self, iteration: int) -> UpdateReport:
        """Waits for the learner group's report on a plan."""
        deadline = time.monotonic() + self.config.pools.learner.update_timeout_s
        while True:
            state: LearnerState = await self._buffer("state", iteration, self._generation, 5.0)
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.generation != self._generation:
                raise LearnerRestartedError
            if state.report is not None:
                return state.report
            self.learners.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not finish iteration {iteration} within "
                    f"{self.config.pools.learner.update_timeout_s:.0f} s (pools.learner.update_timeout_s)"
                )

    async def _republish(self) -> None:
        """Has the learner group publish the weights again, unless the store has them by now."""
        version = self.state.iteration
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            try:
                async with self._learner_turn:
                    if await _awaited(self.store.newest.remote("policy"), 30.0, "the weight store") >= version:
                        return
                    self.progress.say(f"the weight store has lost the weights; publishing version {version} again")
                    averages = self.config.optimizer.ema_decay > 0
                    plan = UpdatePlan(iteration=version, num_groups=0, publish=True, publish_average=averages)
                    await self._submit(plan, [])
                    await self._report(version)
                    return
            except LostActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(1.0)

    async def _rewind(self) -> None:
        """Goes back to the checkpoint from which the restarted learner group resumes."""
        self._enter("waiting for the learner group to restart")
        self.progress.say("the learner group is restarting")
        await self._forget_ahead()
        await self._committed()
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        known = self._generation
        while True:
            try:
                # A buffer that was restarted counts from 0 and waits to be told where the run resumes from.
                state: LearnerState = await self._buffer("state", -1, -1, 0.0)
                if state.generation < known:
                    known = 0
                await self._buffer("set_checkpoint", self._checkpoint_path(), self._checkpoint_iteration())
                state = await self._guard(self._learner_started(known))
                break
            except LearnerRestartedError:
                if time.monotonic() > deadline:
                    raise TrainingError("the trajectory buffer does not come back") from None
                await asyncio.sleep(1.0)
        self.state = self._states[state.resumed]
        self._epoch += 1
        self.tracker.rewind(self.state.iteration)
        self.progress.say(f"the learner group has restarted; going on from iteration {self.state.iteration}")
        await self._guard(self._restore_prm())

    async def _restore_prm(self) -> None:
        """Makes the refresh of the process reward model, if there is one, take up the last checkpoint."""
        process = self.config.rewards.process
        if process is None or process.refresh is None:
            return
        if self.refresh is None:
            self.refresh = RefreshHandle(self.config)
        await self.refresh.restore(
            self.checkpoint.folder if self.checkpoint else None, self.pools["prm"].reachable_handles
        )

    async def _refresh_prm(
        self, iteration: int, groups: Sequence[ScoredGroup], folder: Path | None
    ) -> dict[str, float]:
        """Trains the process reward model on the iteration's samples, where the recipe says so."""
        if self.refresh is None:
            return {}
        replayed = [(g.latents, g.payload, weighted_total(g.scores, self.config.rewards)) for g in groups]
        return await self.refresh.step(iteration, replayed, self.pools["prm"].reachable_handles, folder)

    async def _resize_learners(self, size: int) -> None:
        """Ends the learner group at a checkpoint and starts one of another size from it."""
        old = self.config.pools.learner
        each = {"CPU": old.num_cpus, "GPU": old.num_gpus, **old.resources}
        lacking = _lacking({name: amount * (size - old.num_workers) for name, amount in each.items() if amount})
        if size > old.num_workers and lacking:
            self.progress.say(f"the learner group stays at {old.num_workers} ranks: {size} do not fit ({lacking})")
            self._learner_size = old.num_workers
            return
        self.progress.say(f"learner group {old.num_workers} -> {size} ranks, from iteration {self.state.iteration}")
        self._enter(f"restarting the learner group with {size} ranks")
        async with self._learner_turn:
            await self._checkpoint_now(stop=True)
            await asyncio.to_thread(self.learners.join, 60)
            learner = old.model_copy(update={"num_workers": size})
            pools = self.config.pools.model_copy(update={"learner": learner})
            self.config = self.config.model_copy(update={"pools": pools})
            self.learners = self.learner_group()
            self.learners.start()
            # Weights and versions stay what they were, so what was drawn ahead stays good.
            await self._guard(self._learner_started(self._generation))
        self.progress.say(f"the learner group has {size} ranks")

    async def _commit_later(self, folder: Path) -> None:
        """Hashes and renames a filled checkpoint on a thread, one at a time, while the run goes on."""
        await self._committed()
        state, config = self.state, dump_config(self.config)

        async def commit() -> None:
            began = time.monotonic()
            self.checkpoint = await asyncio.to_thread(self.checkpoints.commit, folder, state, config)
            self._states[state.iteration] = state
            self._commit_s = time.monotonic() - began
            with contextlib.suppress(LearnerRestartedError):
                # A buffer that is being restarted is told by whoever recovers it.
                await self._buffer("set_checkpoint", self._checkpoint_path(), state.iteration)

        self._committing = asyncio.ensure_future(commit())

    async def _committed(self) -> None:
        """Waits for the commit under way.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._committing is not None:
            committing, self._committing = self._committing, None
            await committing

    def _checkpoint_path(self) -> str | None:
        return None if self.checkpoint is None else str(self.checkpoint.folder.resolve())

    def _checkpoint_iteration(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.state.iteration

    def _export(self) -> None:
        """Writes the trained policy as a diffusers folder."""
        from orchestrator.export import export_checkpoint

        assert self.checkpoint is not None
        target = self.config.run_dir / "export"
        shutil.rmtree(target, ignore_errors=True)
        export_checkpoint(self.checkpoint.folder, self.config, target)
        self.progress.say(f"trained pipeline: {target} (DiffusionPipeline.from_pretrained)")

    # --- evaluation ---------------------------------------------------------------------------------------------

    async def _evaluate(self, iteration: int) -> dict[str, float]:
        began = time.monotonic()
        self._enter(f"iteration {iteration}: evaluation")
        config = self.config
        kind = "average" if config.optimizer.ema_decay > 0 and iteration > 0 else "policy"
        prompts, seeds = evaluation_set(config)
        count = min(len(prompts), max(1, len(self.pools["rollout"].present)))
        shares = [slice(i, None, count) for i in range(count)]
        parts = await asyncio.gather(*(self._evaluated(prompts[s], seeds[s], kind) for s in shares))
        latents = np.empty((len(prompts), *parts[0].shape[1:]), dtype=np.float32)
        for share, part in zip(shares, parts, strict=True):
            latents[share] = part
        timeout = config.rollout.deadline_s
        scores, _ = await self._judged(lambda server: server.score.remote(latents, prompts, timeout), timeout)
        shown = np.linspace(0, len(prompts) - 1, min(config.evaluation.clips, len(prompts))).round().astype(int)
        if len(shown):
            videos = await self._judged(lambda server: server.videos.remote(latents[shown]), timeout)
            sheet = Evaluation(config.run_dir / "samples").save(
                iteration, [prompts[i] for i in shown], videos, {n: v[shown] for n, v in scores.items()}
            )
            self.tracker.picture("samples", np.asarray(sheet), iteration)
        weights = {reward.name: reward.weight for reward in config.rewards.outcome}
        total = sum(weights[name] * float(values.mean()) for name, values in scores.items())
        return {
            **{f"eval/{name}/mean": float(values.mean()) for name, values in scores.items()},
            "eval/total/mean": total / sum(map(abs, weights.values())),
            "time/evaluation_s": time.monotonic() - began,
        }

    async def _evaluated(self, prompts: Sequence[str], seeds: Sequence[int], kind: str) -> Array:
        """Samples of one share of the evaluation; goes before all groups, and to another actor if one is lost."""
        pool, error = self.pools["rollout"], TrainingError("no attempt was made")
        for _ in range(self.config.rewards.attempts):
            try:
                async with pool.exclusive(priority=-1) as member:
                    call = member.handle.evaluate.remote(prompts, seeds, self._context(kind))
                    deadline = self.config.rollout.deadline_s
                    return await self._answer(pool, member, call, deadline, "evaluation samples", kill=True)
            except LostActorError as lost:
                error = lost
            except WeightsMissingError as missing:
                error = missing
                await self._republish()
        raise error

    async def _judged(self, send: Callable[[Any], Any], timeout_s: float) -> Any:
        """An ORM server's answer."""
        asking = asyncio.ensure_future(self.judges.ask(send, timeout_s))
        self._scoring.add(asking)
        asking.add_done_callback(self._scoring.discard)
        return await asking

    # --- looking at it and changing it --------------------------------------------------------------------------

    def _load(self, metrics: dict[str, float], span: float) -> dict[str, float]:
        """Busy fractions and sizes of all pools."""
        worked = ("time/fetch_s", "time/update_s", "time/publish_s", "time/checkpoint_s")
        self._learner_busy = min(1.0, sum(metrics.get(part, 0.0) for part in worked) / span)
        record = {"busy/learner": self._learner_busy}
        record["pool/learner"] = float(self.config.pools.learner.num_workers)
        for role, pool in self.pools.items():
            record[f"busy/{role}"] = pool.busy_fraction()
            record[f"pool/{role}"] = float(len(pool.present))
        return record

    def _advice(self, record: dict[str, float]) -> str | None:
        busy = {key.removeprefix("busy/"): value for key, value in record.items() if key.startswith("busy/")}
        sizes = {key.removeprefix("pool/"): int(value) for key, value in record.items() if key.startswith("pool/")}
        return advice(busy, sizes, self.config.rollout.max_staleness)

    def _snapshot(self) -> dict[str, Any]:
        held, ranks = self._held_now(), self.config.pools.learner.num_workers
        learner: dict[str, Any] = {
            "wanted": self._learner_size, "present": ranks if self._generation else 0, "working": None,
            "busy": self._learner_busy, "members": {},
        }  # fmt: skip
        return {
            "phase": self._phase,
            "version": self.state.iteration,
            "iterations": self.config.iterations,
            "pools": {**{role: pool.snapshot() for role, pool in self.pools.items()}, "learner": learner},
            "queue": {"groups": held.groups, "bytes": held.nbytes},
            "last": self._last,
        }

    async def _poll_desk(self) -> None:
        """Leaves snapshots at the control desk and does what is asked there."""
        while True:
            try:
                requests = await _awaited(self.desk.exchange.remote(self._snapshot()), 30.0, "the control desk")
            except EuphoniumError as error:
                log.warning("the control desk does not answer: %s", error)
                requests = []
            for sizes in requests:
                self._rescale(sizes)
            await asyncio.sleep(POLL_EVERY_S)

    def _rescale(self, sizes: dict[str, int]) -> None:
        for role, size in sizes.items():
            if role == "learner":
                self._learner_size = size
                continue
            pool = self.pools.get(role)
            if pool is None:
                continue
            self.progress.say(f"{role} pool {pool.wanted} -> {size}")
            # A rollout keeps the servers' names for as long as its group takes.
            drained = {"rollout": None, "prm": self.pools["rollout"].quiet, "orm": self._scored}
            pool.resize(size, drained=drained[role])

    # --- helpers -------------------------------------------------------------------------------------------------

    def _record(self, record: dict[str, float]) -> None:
        self.tracker.record(record)
        self._last = self.progress.iteration(record)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self.progress.phase(phase)

    async def _guard(self, work: Awaitable[_T]) -> _T:
        """Awaits work that may be given up when a stop is requested or the learner group is lost."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            while True:
                done, _ = await asyncio.wait({task, stop}, timeout=2.0, return_when=asyncio.FIRST_COMPLETED)
                if task in done:
                    return task.result()
                if stop in done:
                    raise StopRequestedError
                self.learners.check()
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, EuphoniumError):
                    await task


class _LateError(LostActorError):
    """The actor that was asked hangs, or has too much to do; another one may do."""


async def _awaited(ref: Any, timeout_s: float, what: str) -> Any:
    """Result of a Ray call, with a deadline and typed errors."""
    import ray

    try:
        return await asyncio.wait_for(asyncio.ensure_future(_unwrap(ref)), timeout_s)
    except TimeoutError as error:
        raise _LateError(f"{what} did not come within {timeout_s:.0f} s") from error
    except ray.exceptions.RayTaskError as error:
        raise remote_error(error, what) from error
    except ray.exceptions.RayError as error:
        raise LostActorError(f"{what}: {describe(error)}") from error


async def _unwrap(ref: Any) -> Any:
    return await ref


def _lacking(demand: dict[str, float]) -> str:
    """What the cluster does not have free of a demand, in words; empty if it has all."""
    import ray

    free = ray.available_resources()
    short = {name: amount for name, amount in demand.items() if amount > free.get(name, 0.0) + 1e-6}
    return free_resources(short) if short else ""

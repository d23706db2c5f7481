"""The run loop: ties the roles together, one iteration as one transaction.

    prompts -> rollout actors <-> PRM servers
                    | latents (reference)            | transitions (reference)
                    v                                v
               ORM servers -> advantages -> trajectory buffer <- lease -- learner group (ZeRO-3)
                                                                              |
               rollout actors <------ weight store <------ publish -----------+

The loop waits for: rollout and scoring of all groups of the iteration (each with a deadline, retried elsewhere,
then dropped and counted); the learner group's report (deadline, or its failure, or its restart, which rewinds the
run to the last checkpoint); the rollout actors' pulls. It runs on asyncio in the driver; Ray calls are awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from actors.rollout import RolloutActor
from core.config import RunConfig, dump_config
from core.deadlines import describe, remote_error
from core.errors import EuphoniumError, RewardError, TrainingError
from core.records import Array, GroupInfo, GroupTask, UpdatePlan, UpdateReport
from core.servers import ServerPool
from dynamics import GroupRewards, group_advantages
from learners.prm_refresh import weighted_total
from orchestrator.buffer import BufferedGroup, LearnerState, TrajectoryBuffer
from orchestrator.checkpoints import Checkpoint, CheckpointStore, RunState
from orchestrator.evaluation import Evaluation, evaluation_set
from orchestrator.learner_group import LearnerGroup
from orchestrator.pools import ActorPool, wait_ready
from orchestrator.prm_refresh import RefreshHandle
from orchestrator.prompts import PromptStream, read_prompts
from orchestrator.statistics import RewardFailures, RewardWatch, rollout_statistics
from orchestrator.tracking import Progress, Tracker, read_metrics
from orchestrator.weight_store import WeightStore
from reward_servers.orm import OrmActor
from reward_servers.prm import PrmActor

log = logging.getLogger(__name__)

_T = TypeVar("_T")
BUFFER, STORE = "trajectory-buffer", "weight-store"
BUFFER_BYTES = 2 << 30


class StopRequestedError(Exception):
    """SIGTERM or SIGINT: leave at the next point from which the run can go on."""


class LearnerRestartedError(Exception):
    """The learner group died and is back, at the last checkpoint."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards; ``latents`` and ``payload`` are references to final latents and transitions."""

    info: GroupInfo
    latents: Any
    payload: Any
    scores: dict[str, Array]
    scoring_s: float


class Run:
    """One training run in a running Ray cluster."""

    def __init__(self, config: RunConfig, namespace: str, resume: Checkpoint | None) -> None:
        self.config = config
        self.namespace = namespace
        self.checkpoint = resume
        self.state = resume.state if resume else self._fresh_state()
        self.prompts = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
        self.checkpoints = CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep_last)
        self.tracker = Tracker(config, self.state.iteration)
        self.progress = Progress(config.iterations, self.state.iteration)
        self._stop: asyncio.Event = asyncio.Event()
        self._generation = 0
        names = [reward.name for reward in config.rewards.outcome]
        self.judges = ServerPool("orm", lambda: self.pools["orm"].handles, config.rewards, rewards=names)
        self.failures = RewardFailures(config.rewards)
        self.watch = RewardWatch(config.rewards.watch, read_metrics(self.tracker.path))
        self.refresh: RefreshHandle | None = None

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
            self.progress.close()
            self.tracker.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _start_roles(self) -> None:
        import ray

        config, pools = self.config, self.config.pools
        self.store = ray.remote(WeightStore).options(name=STORE, num_cpus=0).remote()
        self.buffer = ray.remote(TrajectoryBuffer).options(name=BUFFER, num_cpus=0).remote(config, BUFFER_BYTES)
        await self.buffer.set_checkpoint.remote(self._checkpoint_path(), self.state.iteration)
        self.learners = LearnerGroup(config, self.namespace, BUFFER, STORE)
        self.learners.start()
        self.pools: dict[str, ActorPool] = {}
        if config.rewards.process is not None:
            self.pools["prm"] = ActorPool("prm", pools.prm, lambda i: (PrmActor, (i, config)))
        self.pools["orm"] = ActorPool("orm", pools.orm, lambda i: (OrmActor, (i, config)))
        servers = self.pools["prm"].names if "prm" in self.pools else []
        judges = self.pools["orm"].names
        self.pools["rollout"] = ActorPool(
            "rollout", pools.rollout, lambda i: (RolloutActor, (i, config, servers, judges, STORE))
        )
        self.progress.phase("starting roles")
        await self._guard(wait_ready(list(self.pools.values()), pools.start_timeout_s, self.progress.say))
        await self._guard(self._learner_started())
        self._generation = await self.buffer.generation.remote()
        await self._guard(self._restore_prm())
        if self.tracker.endpoint is not None:
            self.progress.say(f"metrics at {self.tracker.endpoint.address}")

    async def _learner_started(self) -> None:
        deadline = time.monotonic() + self.config.pools.learner.start_timeout_s
        while await self.buffer.generation.remote() == 0:
            state: LearnerState = await self.buffer.state.remote(-1, 2.0)
            if state.failure is not None:
                raise TrainingError(state.failure)
            self.learners.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not start within {self.config.pools.learner.start_timeout_s:.0f} s; see "
                    "the Train tab of the Ray dashboard, or raise pools.learner.start_timeout_s"
                )

    async def _train(self) -> None:
        await self._guard(self._sync_rollouts(self.state.iteration))
        if self.state.iteration == 0:
            values = await self._guard(self._evaluate(0))
            self._record({"iteration": 0, "policy_version": 0, **values})
        while self.state.iteration < self.config.iterations:
            try:
                await self._iterate()
            except LearnerRestartedError:
                await self._rewind()
        self.learners.join(60)
        self._export()
        self.progress.summary(read_metrics(self.tracker.path))
        self.progress.say(f"before and after: {self.config.run_dir / 'samples' / 'before_after.png'}")

    async def _save_and_stop(self) -> None:
        """Checkpoints where the run stands, after a signal."""
        done = self.state.iteration
        if not self.learners_usable():
            self.progress.say("stopped before training began; nothing to save")
            return
        if self.checkpoint is None or self.checkpoint.state.iteration != done:
            self.progress.say(f"stopping: writing a checkpoint of iteration {done}")
            folder = self.checkpoints.begin(done)
            plan = UpdatePlan(iteration=done, num_groups=0, checkpoint=str(folder.resolve()), stop=True)
            await self.buffer.submit.remote(plan, [])
            await self._report(done)
            self._commit(folder)
        self.progress.say(
            f"stopped after iteration {done}; go on with: euphonium train {self.config.run_dir}/config.resolved.yaml "
            "resume=auto"
        )

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
        self.progress.phase(f"iteration {iteration}: rollout")
        groups, dropped, next_group = await self._guard(self._collect())
        rolled_out = time.monotonic()
        record: dict[str, float] = {"iteration": iteration, "policy_version": iteration}
        buffered, statistics = self._advantages(groups)
        record |= statistics
        record |= {"rollout/dropped_groups": dropped, "time/rollout_s": rolled_out - began}
        record |= self.failures.take() | self.watch.update(iteration, statistics, self.progress.say)
        for group in buffered:
            record["buffer/bytes"] = await self._guard(self.buffer.offer.remote(group))

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
        self.progress.phase(f"iteration {iteration}: update")
        await self.buffer.submit.remote(plan, [group.group_id for group in buffered])
        # From here to the new weights in the rollout actors the transaction must not be cut in two.
        report = await self._report(iteration)
        record |= report.metrics
        syncing = time.monotonic()
        await self._sync_rollouts(iteration)
        record["time/weight_sync_s"] = time.monotonic() - syncing + report.metrics["time/publish_s"]
        record["time/iteration_s"] = time.monotonic() - began
        record |= await self._refresh_prm(iteration, groups, folder)
        self.state = RunState(iteration=iteration, next_group=next_group, world_size=config.pools.learner.num_workers)
        if folder is not None:
            self._commit(folder)
        try:
            if evaluates:
                record |= await self._guard(self._evaluate(iteration))
        finally:
            # The update is done and checkpointed: it is on record even if the evaluation was cut short.
            self._record(record)
        if self._stop.is_set() and not last:
            raise StopRequestedError

    async def _collect(self) -> tuple[list[ScoredGroup], int, int]:
        """Draws and scores the iteration's groups; groups whose rewards cannot be had are dropped and counted."""
        count = self.config.rollout.prompts_per_iteration
        first = self.state.next_group
        tasks = [self.prompts.task(first + i, self.state.iteration) for i in range(count)]
        results = await asyncio.gather(*(self._attempt(task) for task in tasks))
        groups = [group for group in results if isinstance(group, ScoredGroup)]
        lost = [reason for reason in results if isinstance(reason, str)]
        if len(lost) > self.config.rewards.max_dropped_fraction * count or not groups:
            raise RewardError(
                f"{len(lost)} of {count} groups were lost in one iteration (rewards.max_dropped_fraction is "
                f"{self.config.rewards.max_dropped_fraction}). The last reason: {lost[-1]}"
            )
        return groups, len(lost), first + count

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
            except _ActorLostError as error:
                reason = str(error)
        return reason

    async def _draw_and_score(self, task: GroupTask) -> ScoredGroup:
        rollout = self.pools["rollout"]
        deadline = self.config.rollout.deadline_s
        actor = await rollout.acquire(deadline)
        try:
            # The driver makes the call, so it owns the three results: they outlive the actor.
            info_ref, latents, payload = actor.generate.options(num_returns=3).remote(task)
            info: GroupInfo = await _awaited(info_ref, deadline, f"group {task.group_id} from the rollout pool")
        finally:
            rollout.release(actor)
        prompts = [task.prompt] * self.config.rollout.group_size
        timeout = self.config.rewards.deadline_s
        scores, seconds = await self.judges.ask(lambda server: server.score.remote(latents, prompts, timeout))
        return ScoredGroup(info, latents, payload, scores, seconds)

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
                fingerprint=group.info.fingerprint,
            )
            for group, result in zip(groups, results, strict=True)
        ]
        scoring = {"time/scoring_s": sum(group.scoring_s for group in groups)}
        infos, scores = [group.info for group in groups], [group.scores for group in groups]
        return buffered, scoring | rollout_statistics(self.config, infos, scores, results)

    # --- learner, weights, checkpoints --------------------------------------------------------------------

    async def _report(self, iteration: int) -> UpdateReport:
        """Waits for the learner group's report on a plan."""
        deadline = time.monotonic() + self.config.pools.learner.update_timeout_s
        while True:
            state: LearnerState = await self.buffer.state.remote(iteration, 5.0)
            if state.failure is not None:
                raise TrainingError(state.failure)
            if state.report is not None:
                return state.report
            if state.generation != self._generation:
                self._generation = state.generation
                raise LearnerRestartedError
            self.learners.check()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the learner group did not finish iteration {iteration} within "
                    f"{self.config.pools.learner.update_timeout_s:.0f} s (pools.learner.update_timeout_s)"
                )

    async def _sync_rollouts(self, version: int, kind: str = "policy") -> None:
        """Has every rollout actor pull a published version."""
        timeout = self.config.pools.start_timeout_s
        pulls = [actor.update_weights.remote(version, kind) for actor in self.pools["rollout"].handles]
        await asyncio.gather(*(_awaited(pull, timeout, f"the pull of version {version}") for pull in pulls))

    async def _rewind(self) -> None:
        """Goes back to the checkpoint from which the restarted learner group resumes."""
        self.state = self.checkpoint.state if self.checkpoint is not None else self._fresh_state()
        self.tracker.rewind(self.state.iteration)
        self.progress.say(f"the learner group has restarted; going on from iteration {self.state.iteration}")
        await self._guard(self._sync_rollouts(self.state.iteration))
        await self._guard(self._restore_prm())

    async def _restore_prm(self) -> None:
        """Makes the refresh of the process reward model, if there is one, take up the last checkpoint."""
        process = self.config.rewards.process
        if process is None or process.refresh is None:
            return
        if self.refresh is None:
            self.refresh = RefreshHandle(self.config)
        await self.refresh.restore(self.checkpoint.folder if self.checkpoint else None, self.pools["prm"].handles)

    async def _refresh_prm(
        self, iteration: int, groups: Sequence[ScoredGroup], folder: Path | None
    ) -> dict[str, float]:
        """Trains the process reward model on the iteration's samples, where the recipe says so."""
        if self.refresh is None:
            return {}
        replayed = [(g.latents, g.payload, weighted_total(g.scores, self.config.rewards)) for g in groups]
        return await self.refresh.step(iteration, replayed, self.pools["prm"].handles, folder)

    def _commit(self, folder: Path) -> None:
        self.checkpoint = self.checkpoints.commit(folder, self.state, dump_config(self.config))
        self.buffer.set_checkpoint.remote(self._checkpoint_path(), self.state.iteration)

    def _checkpoint_path(self) -> str | None:
        return None if self.checkpoint is None else str(self.checkpoint.folder.resolve())

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
        self.progress.phase(f"iteration {iteration}: evaluation")
        config = self.config
        averaged = config.optimizer.ema_decay > 0 and iteration > 0
        if averaged:
            await self._sync_rollouts(iteration, "average")
        prompts, seeds = evaluation_set(config)
        actors = self.pools["rollout"].handles
        shares = [slice(i, None, len(actors)) for i in range(len(actors))]
        timeout = config.rollout.deadline_s
        calls = [actor.evaluate.remote(prompts[s], seeds[s]) for actor, s in zip(actors, shares, strict=True)]
        parts = await asyncio.gather(*(_awaited(call, timeout, "evaluation samples") for call in calls))
        latents = np.empty((len(prompts), *parts[0].shape[1:]), dtype=np.float32)
        for share, part in zip(shares, parts, strict=True):
            latents[share] = part
        orm = self.pools["orm"].next()
        scores, _ = await _awaited(orm.score.remote(latents, prompts), timeout, "evaluation rewards")
        shown = np.linspace(0, len(prompts) - 1, min(config.evaluation.clips, len(prompts))).round().astype(int)
        if len(shown):
            videos = await _awaited(orm.videos.remote(latents[shown]), timeout, "evaluation clips")
            sheet = Evaluation(config.run_dir / "samples").save(
                iteration, [prompts[i] for i in shown], videos, {n: v[shown] for n, v in scores.items()}
            )
            self.tracker.picture("samples", np.asarray(sheet), iteration)
        if averaged:
            await self._sync_rollouts(iteration, "policy")
        weights = {reward.name: reward.weight for reward in config.rewards.outcome}
        total = sum(weights[name] * float(values.mean()) for name, values in scores.items())
        return {
            **{f"eval/{name}/mean": float(values.mean()) for name, values in scores.items()},
            "eval/total/mean": total / sum(map(abs, weights.values())),
            "time/evaluation_s": time.monotonic() - began,
        }

    # --- helpers -------------------------------------------------------------------------------------------------

    def _record(self, record: dict[str, float]) -> None:
        self.tracker.record(record)
        self.progress.iteration(record)

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


class _ActorLostError(EuphoniumError):
    """The actor that was asked has died or hangs; another one may do."""


async def _awaited(ref: Any, timeout_s: float, what: str) -> Any:
    """Result of a Ray call, with a deadline and typed errors."""
    import ray

    try:
        return await asyncio.wait_for(asyncio.ensure_future(_unwrap(ref)), timeout_s)
    except TimeoutError as error:
        raise _ActorLostError(f"{what} did not come within {timeout_s:.0f} s") from error
    except ray.exceptions.RayTaskError as error:
        raise remote_error(error, what) from error
    except ray.exceptions.RayError as error:
        raise _ActorLostError(f"{what}: {describe(error)}") from error


async def _unwrap(ref: Any) -> Any:
    return await ref

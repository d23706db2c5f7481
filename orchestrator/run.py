"""The run loop: ties the roles together, one iteration as one transaction.

    prompts -> rollout actors <-> PRM servers
                    | latents (reference)            | transitions (reference)
                    v                                v
               ORM servers -> advantages -> trajectory buffer <- lease -- learner group (ZeRO-3)
                                                                              |
               rollout actors <------ weight store <------ publish -----------+

Drawing and training are two loops that meet in the batches that were drawn ahead (groups/batches.py): the run loop
takes them in order, has the learner group train on them (learning/link.py) and waits for its report.
Every order to a rollout actor says which policy version it takes at least; actors fetch weights themselves, between
groups.

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
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from actors.rollout import RolloutActor
from euphonium.config import RunConfig, dump_config
from euphonium.errors import EuphoniumError
from euphonium.rewards.total import weighted_total
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import Publish, Save, Update
from learners.rewards.refresh import PrmRefreshActor
from orchestrator.checkpoints import BackgroundCommits, Checkpoint, CheckpointStore, RunState
from orchestrator.commands.control import CONTROL, ControlDesk
from orchestrator.evaluation import Evaluator
from orchestrator.groups.batches import BatchSource
from orchestrator.groups.credit import Batch, ScoredGroup, assign_credit
from orchestrator.groups.prompts import PromptStream, read_prompts
from orchestrator.groups.staleness import staleness
from orchestrator.learning.group import LearnerGroup
from orchestrator.learning.link import MAILBOX, STORE, LearnerLink, LearnerRestartedError
from orchestrator.learning.process_reward import RefreshHandle
from orchestrator.pools.ray_session import beside_the_driver, name_is_free
from orchestrator.pools.resources import lacking_resources
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.pools.run_pools import RunPools
from orchestrator.pools.supervisor import ActorFactory
from orchestrator.position import Position
from orchestrator.report.advice import advice
from orchestrator.report.statistics import RewardFailures, RewardWatch
from orchestrator.report.tracking import Progress, Tracker, read_metrics
from reward_servers.orm import OrmActor
from reward_servers.prm import PrmActor

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from euphonium.wire.roles import PrmServer

log = logging.getLogger(__name__)

_T = TypeVar("_T")
POLL_EVERY_S = 1.0


class StopRequestedError(Exception):
    """SIGTERM or SIGINT: leave at the next point from which the run can go on."""


class Run:
    """One training run in a running Ray cluster."""

    def __init__(self, config: RunConfig, namespace: str, resume: Checkpoint | None) -> None:
        self.config = config
        self.namespace = namespace
        fresh = RunState(iteration=0, next_group=0, world_size=config.pools.learner.num_workers)
        self.position = Position(resume.state if resume else fresh)
        self.tracker = Tracker(config, self.state.iteration)
        self.progress = Progress(config.iterations, self.state.iteration)
        self.failures = RewardFailures(config.rewards)
        self.watch = RewardWatch(config.rewards.watch, read_metrics(self.tracker.path))
        self.pools = RunPools(config, self.actors(), self.progress)
        self.rollouts = RolloutService(config, self.pools, self.position, self._republish)
        self.learners = LearnerLink(config, self.progress)
        prompts = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
        self.batches = BatchSource(config, self.rollouts, self.position, prompts, self.failures, self._republish)
        self.evaluator = Evaluator(config, self.rollouts, self.tracker, self._republish)
        self.refresh: RefreshHandle | None = None
        keep = config.checkpoint
        store = CheckpointStore(config.run_dir / "checkpoints", keep.keep_last, keep.keep_every)
        self.commits = BackgroundCommits(store, self.state, resume, self._tell_learners)
        self._stop = asyncio.Event()
        self._learner_size = config.pools.learner.num_workers
        self._learner_busy = 0.0
        self._poller: asyncio.Task[None] | None = None
        self._phase = "starting roles"
        self._last = ""

    @property
    def state(self) -> RunState:
        """What is done."""
        return self.position.state

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
            self.pools.stop()
            await self.batches.forget()
            self.progress.close()
            self.tracker.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _start_roles(self) -> None:
        from euphonium.wire.roles import Desk, start_actor

        await self._guard(name_is_free(self.config.name))
        self.learners.open()
        self.desk = start_actor(Desk, ControlDesk, {"name": CONTROL, **beside_the_driver()})
        await self.learners.resume_from(*self.commits.resume_point)
        self.learners.start(self.learner_group())
        self.pools.start()
        self._enter("starting roles")
        self._poller = asyncio.ensure_future(self._poll_desk())
        await self._guard(self.pools.wait_started())
        await self._guard(self.learners.joined(*self.commits.resume_point))
        await self._guard(self._restore_prm())
        if self.tracker.endpoint is not None:
            self.progress.say(f"metrics at {self.tracker.endpoint.address}")

    def actors(self) -> Mapping[str, ActorFactory]:
        """Class and arguments of the actors of every role, by their index in the pool."""
        config = self.config
        roles: dict[str, ActorFactory] = {}
        if config.rewards.process is not None:
            roles["prm"] = lambda i: (PrmActor, (i, config))
            if config.rewards.process.refresh is not None:
                roles["prm_refresh"] = lambda i: (PrmRefreshActor, (config,))
        roles["orm"] = lambda i: (OrmActor, (i, config))
        roles["rollout"] = lambda i: (RolloutActor, (i, config, STORE))
        return roles

    def learner_group(self) -> LearnerGroup:
        """A learner group of the configured size, not yet started."""
        return LearnerGroup(self.config, self.namespace, MAILBOX, STORE)

    async def _train(self) -> None:
        evaluated = self.state.iteration > 0
        if self.state.iteration == self.config.iterations:
            await self._evaluate_at_last()
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
        await self.commits.finished()
        self.learners.join(60)
        self._export()
        self.progress.summary(read_metrics(self.tracker.path))
        self.progress.say(f"before and after: {self.config.run_dir / 'samples' / 'before_after.png'}")

    async def _evaluate_at_last(self) -> None:
        """Makes up for the last evaluation of a run that was cut short in it."""
        done = self.state.iteration
        await self.learners.carry_out(Publish(version=done, average=self.config.optimizer.averages, stop=True))
        self.learners.dismiss()
        values = await self._guard(self._evaluate(done))
        last = read_metrics(self.tracker.path)[-1]
        self.tracker.rewind(done - 1)
        self._record(last | values)

    async def _save_and_stop(self) -> None:
        """Checkpoints where the run stands, after a signal."""
        done = self.state.iteration
        await self.batches.forget()
        if not self.learners.usable:
            self.progress.say("stopped before training began; nothing to save")
            return
        await self.commits.finished()
        if self.commits.newest is None or self.commits.newest.state.iteration != done:
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
        folder = self.commits.begin(done)
        await self.learners.carry_out(Save(version=done, folder=str(folder.resolve()), stop=stop))
        await self.commits.commit(folder, self.state, dump_config(self.config))
        await self.commits.finished()

    # --- one iteration --------------------------------------------------------------------------------------

    async def _iterate(self) -> None:
        config = self.config
        began = time.monotonic()
        iteration = self.state.iteration + 1
        self._enter(f"iteration {iteration}: rollout")
        batch = await self._guard(self.batches.next())
        groups, statistics = assign_credit(config, batch)
        record: dict[str, float] = {"iteration": iteration, "policy_version": iteration, **statistics}
        record |= self._drawn(iteration, batch)
        record |= self.failures.take() | self.watch.update(iteration, statistics, self.progress.say)

        last = iteration == config.iterations
        evaluates = last or iteration % config.evaluation.every == 0
        saves = last or iteration % config.checkpoint.every == 0
        folder = self.commits.begin(iteration) if saves else None
        order = Update(
            version=iteration,
            groups=tuple(groups),
            payloads=tuple(group.payload for group in batch.groups),
            publish_average=evaluates and config.optimizer.averages,
            checkpoint=str(folder.resolve()) if folder is not None else None,
            stop=last,
            receivers=() if evaluates else self.pools.weight_receivers(),
            epoch=self.position.history,
        )
        self._enter(f"iteration {iteration}: update")
        # From here to the report the transaction must not be cut in two.
        async with self.learners.turn:
            report = await self.learners.carry_out(order)
        if last:
            self.learners.dismiss()
        record |= report.metrics
        pulls = max(group.info.seconds["weights"] for group in batch.groups)
        record["time/weight_sync_s"] = report.metrics["time/publish_s"] + pulls
        record["time/iteration_s"] = time.monotonic() - began
        record |= await self._refresh_prm(iteration, batch.groups, folder)
        self.position.state = RunState(
            iteration=iteration, next_group=batch.next_group, world_size=config.pools.learner.num_workers
        )
        await self.batches.trained(batch)
        record |= self._load(report.metrics, record["time/iteration_s"])
        if folder is not None:
            await self.commits.commit(folder, self.state, dump_config(config))
        if (seconds := self.commits.take_seconds()) is not None:
            record["time/commit_s"] = seconds
        try:
            if evaluates:
                if not last and config.rollout.max_staleness > 0:
                    self.batches.draw_ahead()
                record |= await self._guard(self._evaluate(iteration))
        finally:
            # The update is done and checkpointed: it is on record even if the evaluation was cut short.
            self._record(record)
        if evaluates and (line := self._advice(record)):
            self.progress.say(line)
        if self._stop.is_set() and not last:
            raise StopRequestedError

    def _drawn(self, iteration: int, batch: Batch) -> dict[str, float]:
        """Metrics of a batch, and of what waits with it."""
        held = self.batches.held()
        lags = [staleness(iteration - 1, group.info.policy_version) for group in batch.groups]
        return {
            "rollout/dropped_groups": batch.dropped,
            "time/rollout_s": batch.seconds,
            "buffer/groups": held.groups,
            "buffer/bytes": held.nbytes,
            "staleness/mean": float(np.mean(lags)),
            "staleness/max": float(max(lags)),
        }

    async def _evaluate(self, iteration: int) -> dict[str, float]:
        self._enter(f"iteration {iteration}: evaluation")
        return await self.evaluator.evaluate(iteration)

    # --- learner, weights, checkpoints --------------------------------------------------------------------

    async def _republish(self) -> None:
        await self.learners.republish(self.state.iteration)

    async def _tell_learners(self, checkpoint: Checkpoint) -> None:
        with contextlib.suppress(LearnerRestartedError):
            # A buffer that is being restarted is told by whoever recovers it.
            await self.learners.resume_from(str(checkpoint.folder.resolve()), checkpoint.state.iteration)

    async def _rewind(self) -> None:
        """Goes back to the checkpoint from which the restarted learner group resumes."""
        self._enter("waiting for the learner group to restart")
        self.progress.say("the learner group is restarting")
        await self.batches.forget()
        await self.commits.finished()
        self.commits.abandon()
        resumed = await self._guard(self.learners.joined(*self.commits.resume_point))
        self.position.state = self.commits.state_of(resumed)
        self.position.history += 1
        self.tracker.rewind(self.state.iteration)
        self.progress.say(f"the learner group has restarted; going on from iteration {self.state.iteration}")
        await self._guard(self._restore_prm())

    async def _restore_prm(self) -> None:
        """Makes the refresh of the process reward model, if there is one, take up the last checkpoint."""
        pool = self.pools.prm_refresh
        if pool is None:
            return
        await pool.roster.wait_present()
        if self.refresh is None:
            self.refresh = RefreshHandle(self.config, pool.roster.members[0].handle)
        newest = self.commits.newest
        await self.refresh.restore(newest.folder if newest else None, self._prm_servers())

    async def _refresh_prm(
        self, iteration: int, groups: Sequence[ScoredGroup], folder: Path | None
    ) -> dict[str, float]:
        """Trains the process reward model on the iteration's samples, where the recipe says so."""
        if self.refresh is None or self.pools.prm_refresh is None:
            return {}
        rewards = self.config.rewards.outcome
        replayed = [(g.latents, g.payload, weighted_total(g.scores, rewards)) for g in groups]
        async with self.pools.prm_refresh.exclusive(0):
            metrics = await self.refresh.step(iteration, replayed, self._prm_servers(), folder)
        if "process/refresh_pairs" in metrics:
            self.progress.say(
                f"process reward model refreshed on {metrics['process/refresh_pairs']:.0f} pairs in "
                f"{metrics['time/prm_refresh_s']:.0f} s"
            )
        return metrics

    def _prm_servers(self) -> list[ActorProxy[PrmServer]]:
        return [] if self.pools.prm is None else self.pools.prm.reachable_handles

    async def _resize_learners(self, size: int) -> None:
        """Ends the learner group at a checkpoint and starts one of another size from it."""
        old = self.config.pools.learner
        more = {name: amount * (size - old.num_workers) for name, amount in old.reserved.items()}
        lacking = lacking_resources(more)
        if size > old.num_workers and lacking:
            self.progress.say(f"the learner group stays at {old.num_workers} ranks: {size} do not fit ({lacking})")
            self._learner_size = old.num_workers
            return
        self.progress.say(f"learner group {old.num_workers} -> {size} ranks, from iteration {self.state.iteration}")
        self._enter(f"restarting the learner group with {size} ranks")
        async with self.learners.turn:
            await self._checkpoint_now(stop=True)
            await asyncio.to_thread(self.learners.join, 60)
            learner = old.model_copy(update={"num_workers": size})
            pools = self.config.pools.model_copy(update={"learner": learner})
            self.config = self.config.model_copy(update={"pools": pools})
            self.learners.start(self.learner_group())
            # Weights and versions stay what they were, so what was drawn ahead stays good.
            await self._guard(self.learners.replaced())
        self.progress.say(f"the learner group has {size} ranks")

    def _export(self) -> None:
        """Writes the trained policy as a diffusers folder."""
        from orchestrator.export_policy import export_checkpoint

        assert self.commits.newest is not None
        target = self.config.run_dir / "export"
        shutil.rmtree(target, ignore_errors=True)
        export_checkpoint(self.commits.newest.folder, self.config, target)
        self.progress.say(f"trained pipeline: {target} (DiffusionPipeline.from_pretrained)")

    # --- looking at it and changing it --------------------------------------------------------------------------

    def _load(self, metrics: dict[str, float], span: float) -> dict[str, float]:
        """Busy fractions and sizes of all pools."""
        worked = ("time/fetch_s", "time/update_s", "time/publish_s", "time/checkpoint_s")
        self._learner_busy = min(1.0, sum(metrics.get(part, 0.0) for part in worked) / span)
        ranks = float(self.config.pools.learner.num_workers)
        return {"busy/learner": self._learner_busy, "pool/learner": ranks, **self.pools.load()}

    def _advice(self, record: dict[str, float]) -> str | None:
        busy = {key.removeprefix("busy/"): value for key, value in record.items() if key.startswith("busy/")}
        sizes = {key.removeprefix("pool/"): int(value) for key, value in record.items() if key.startswith("pool/")}
        return advice(busy, sizes, self.config.rollout.max_staleness)

    def _snapshot(self) -> dict[str, Any]:
        held, ranks = self.batches.held(), self.config.pools.learner.num_workers
        learner: dict[str, Any] = {
            "wanted": self._learner_size, "present": ranks if self.learners.has_joined else 0, "working": None,
            "busy": self._learner_busy, "members": {},
        }  # fmt: skip
        return {
            "phase": self._phase,
            "version": self.state.iteration,
            "iterations": self.config.iterations,
            "pools": {**self.pools.status(), "learner": learner},
            "queue": {"groups": held.groups, "bytes": held.nbytes},
            "last": self._last,
        }

    async def _poll_desk(self) -> None:
        """Leaves snapshots at the control desk and does what is asked there."""
        while True:
            try:
                requests = await awaited(self.desk.exchange.remote(self._snapshot()), 30.0, "the control desk")
            except EuphoniumError as error:
                log.warning("the control desk does not answer: %s", error)
                requests = []
            for sizes in requests:
                self._rescale(sizes)
            await asyncio.sleep(POLL_EVERY_S)

    def _rescale(self, sizes: dict[str, int]) -> None:
        for role, size in sizes.items():
            if role == "learner":
                # Between iterations, see _train.
                self._learner_size = size
            else:
                self.pools.resize(role, size)

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

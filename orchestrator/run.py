"""A training run in a Ray cluster: its parts, and the steps that need several of them.

The loop is in algorithm.py, start and end are in lifecycle.py. Between two iterations a run is defined by its position
and the learner group's weights; whatever was drawn ahead can be drawn again.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import TypeVar

from actors.rollout import RolloutActor
from euphonium.config import RunConfig, dump_config
from euphonium.wire.balancer import LoadBalancer
from euphonium.wire.records import PoolSnapshot, RunSnapshot, Save, TrainingGroup, Update, UpdateReport
from euphonium.wire.roles import Balancer, OrmServer, PrmRefresher, PrmServer, RolloutServer, start_actor
from learners.rewards.refresh import PrmRefreshActor
from orchestrator.desk import DeskLine
from orchestrator.evaluation import Evaluator
from orchestrator.groups.batches import BatchSource
from orchestrator.groups.credit import Batch
from orchestrator.groups.prompts import PromptStream, read_prompts
from orchestrator.journal import Entry, Journal
from orchestrator.learning.group import LearnerGroup
from orchestrator.learning.link import MAILBOX, STORE, LearnerLink, LearnerRestartedError
from orchestrator.learning.placement import told_meanwhile
from orchestrator.learning.process_reward import ProcessRewardRefresh
from orchestrator.learning.stream import Stream
from orchestrator.pools.ray_session import beside_the_driver
from orchestrator.pools.resources import lacking_resources
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.pools.run_pools import ActorFactories, RunPools
from orchestrator.report.operations import Operations
from orchestrator.state.checkpoints import BackgroundCommits, Checkpoint, CheckpointStore, RunState
from orchestrator.state.interruption import Interruption
from orchestrator.state.position import Position, Turn
from reward_servers.orm import OrmActor
from reward_servers.prm import PrmActor

_T = TypeVar("_T")
JOIN_TIMEOUT_S = 60.0
BALANCER = "load-balancer"


class Run:
    """One training run.

    Attributes:
        config: of the run, with the learner group's present size.
        position: what is done.
        journal: what is on record.
        interruption: whether it is to stop.
        pools: of rollout actors and reward servers.
        rollouts: what is asked of them.
        learners: the line to the learner group.
        batches: draws ahead.
        stream: takes batches from there, and has the learner group begin with those that are not whole yet.
        evaluator: evaluates on held-out prompts.
        checkpoints: commits them.
        desk: tells people, and hears from them.
        process_reward: keeps the process reward model up with the policy.
    """

    def __init__(self, config: RunConfig, namespace: str, resume: Checkpoint | None) -> None:
        self.config = config
        self._namespace = namespace
        fresh = RunState(iteration=0, next_group=0, world_size=config.pools.learner.num_workers)
        self.position = Position(resume.state if resume else fresh)
        self.journal = Journal(config, self.position.iteration)
        self.pools = RunPools(config, self.actors(), self.journal.progress)
        self.rollouts = RolloutService(config, self.pools, self.position, self._republish)
        self.learners = LearnerLink(config, self.journal.progress)
        self.interruption = Interruption(self.learners.check)
        prompts = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
        self.batches = BatchSource(
            config, self.rollouts, self.position, prompts, self.journal.failures, self.journal.guidance
        )
        self.stream = Stream(config, self.batches, self.learners, self.position)
        self.evaluator = Evaluator(config, self.rollouts, self.journal.tracker)
        keep = config.checkpoint
        store = CheckpointStore(config.run_dir / "checkpoints", keep.keep_last, keep.keep_every)
        self.checkpoints = BackgroundCommits(store, self.position.state, resume, self._tell_learners)
        self._operations = Operations(config)
        self.desk = DeskLine(config.run_dir, self._snapshot, self._resize)
        self.process_reward = ProcessRewardRefresh(
            config, self.pools, self.interruption, self.checkpoints.newest_folder, self.journal.say
        )
        self._wanted_ranks = config.pools.learner.num_workers

    @property
    def finished(self) -> bool:
        """Whether all iterations are done."""
        return self.position.iteration == self.config.iterations

    def actors(self) -> ActorFactories:
        """What starts the actors of every role."""
        config, process = self.config, self.config.rewards.process
        return ActorFactories(
            rollout=lambda i, options: start_actor(RolloutServer, RolloutActor, options, i, config, STORE),
            orm=lambda i, options: start_actor(OrmServer, OrmActor, options, i, config),
            prm=(lambda i, options: start_actor(PrmServer, PrmActor, options, i, config)) if process else None,
            prm_refresh=(lambda _i, options: start_actor(PrmRefresher, PrmRefreshActor, options, config))
            if process and process.refresh
            else None,
            balancer=lambda: start_actor(
                Balancer, LoadBalancer, {"name": BALANCER, **beside_the_driver()}, run_dir=config.run_dir
            ),
        )

    def learner_group(self) -> LearnerGroup:
        """A learner group of the present size, not yet started."""
        return LearnerGroup(self.config, self._namespace, MAILBOX, STORE)

    async def interruptible(self, work: Awaitable[_T]) -> _T:
        """Awaits work that may be given up.

        Raises:
            StopRequestedError: a stop was requested meanwhile; the work has been cancelled.
            TrainingError: the learner group has ended.
        """
        return await self.interruption.interruptible(work)

    # --- one iteration --------------------------------------------------------------------------------------------

    async def update(
        self, turn: Turn, batch: Batch, groups: Sequence[TrainingGroup], checkpoint: Path | None
    ) -> UpdateReport:
        """Has the learner group train on an iteration's groups, publish, and fill a checkpoint's folder.

        Raises:
            LearnerRestartedError: the group has gone back to the last checkpoint.
            TrainingError: it failed, or took too long.
        """
        self.journal.enter(f"iteration {turn.number}: update")
        order = Update(
            version=turn.number,
            groups=tuple(groups),
            payloads=tuple(group.payload for group in batch.groups),
            publish_average=turn.evaluates and self.config.optimizer.averages,
            checkpoint=str(checkpoint.resolve()) if checkpoint is not None else None,
            stop=turn.last,
            receivers=() if turn.evaluates else self.pools.weight_receivers(),
            history=self.position.history,
        )
        await self.rollouts.sleep()
        async with self.learners.turn:
            report = await self.learners.carry_out(order)
        if turn.last:
            self.learners.dismiss()
        return self.stream.whole(report)

    async def commit(self, turn: Turn, batch: Batch, entry: Entry, checkpoint: Path | None) -> None:
        """Ends the transaction: the position moves past the iteration, and its checkpoint is committed.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        ranks = self.config.pools.learner.num_workers
        self.position.state = RunState(iteration=turn.number, next_group=batch.next_group, world_size=ranks)
        await self.batches.trained(batch)
        entry.numbers |= self._operations.rates([group.info for group in batch.groups], entry.numbers, ranks)
        entry.numbers |= {"busy/learner": entry.busy_share(), "pool/learner": float(ranks), **self.pools.load()}
        if checkpoint is not None:
            await self.checkpoints.commit(checkpoint, self.position.state, dump_config(self.config))
        if (seconds := self.checkpoints.take_seconds()) is not None:
            entry.numbers["time/commit_s"] = seconds
        entry.committed = True
        if turn.evaluates:
            # The next groups are drawn beside the evaluation, whose samples go first.
            self.batches.draw_ahead()

    async def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics on held-out prompts after an iteration, 0 before training.

        Raises:
            StopRequestedError: a stop was requested meanwhile.
        """
        self.journal.enter(f"iteration {iteration}: evaluation")
        return await self.interruptible(self.evaluator.evaluate(iteration))

    async def save(self, *, stop: bool) -> None:
        """Writes a checkpoint of the last iteration; with ``stop``, the learner group ends after it.

        Raises:
            LearnerRestartedError: the group died over it.
            CheckpointError: it could not be written.
        """
        done = self.position.iteration
        folder = self.checkpoints.begin(done)
        await self.learners.carry_out(Save(version=done, folder=str(folder.resolve()), stop=stop))
        await self.process_reward.save(folder)
        await self.checkpoints.commit(folder, self.position.state, dump_config(self.config))
        await self.checkpoints.finished()

    def export(self) -> None:
        """Writes the trained policy as a diffusers folder."""
        from euphonium.generators.folder import INDEX, index_name
        from orchestrator.export_policy import export_checkpoint

        assert self.checkpoints.newest is not None
        target = self.config.run_dir / "export"
        shutil.rmtree(target, ignore_errors=True)
        export_checkpoint(self.checkpoints.newest.folder, self.config, target)
        opener = "DiffusionPipeline" if index_name(target) == INDEX else "ModularPipeline"
        self.journal.say(f"trained pipeline: {target} ({opener}.from_pretrained)")

    # --- the learner group is replaced ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def recovery(self) -> AsyncIterator[None]:
        """Takes the run back to the checkpoint from which a learner group that died meanwhile resumes."""
        try:
            yield
        except LearnerRestartedError:
            await self._rewind()

    async def _rewind(self) -> None:
        self.journal.enter("waiting for the learner group to restart")
        self.journal.say("the learner group is restarting")
        await self.batches.forget()
        await self.checkpoints.finished()
        self.checkpoints.abandon()
        joined = self.learners.joined(*self.checkpoints.resume_point)
        resumed = await self.interruptible(told_meanwhile(joined, self.config.pools.learner, self.journal.say))
        self.position.state = self.checkpoints.state_of(resumed)
        self.position.history += 1
        self.journal.rewind(self.position.iteration)
        self.journal.say(f"the learner group has restarted; going on from iteration {self.position.iteration}")
        await self.interruptible(self.process_reward.restore())

    async def resize_learners(self) -> None:
        """Ends the learner group at a checkpoint and starts one of another size from it, if one was asked for."""
        old, size = self.config.pools.learner, self._wanted_ranks
        if size == old.num_workers:
            return
        done = self.position.iteration
        more = {name: amount * (size - old.num_workers) for name, amount in old.reserved.items()}
        lacking = lacking_resources(more)
        if size > old.num_workers and lacking:
            self.journal.say(f"the learner group stays at {old.num_workers} ranks: {size} do not fit ({lacking})")
            self._wanted_ranks = old.num_workers
            return
        self.journal.say(f"learner group {old.num_workers} -> {size} ranks, from iteration {done}")
        self.journal.enter(f"restarting the learner group with {size} ranks")
        async with self.learners.turn:
            await self.save(stop=True)
            await asyncio.to_thread(self.learners.join, JOIN_TIMEOUT_S)
            pools = self.config.pools.model_copy(update={"learner": old.model_copy(update={"num_workers": size})})
            self.config = self.config.model_copy(update={"pools": pools})
            self.learners.start(self.learner_group())
            # Weights and versions stay what they were, so what was drawn ahead stays good.
            await self.interruptible(self.learners.replaced())
        self.journal.say(f"the learner group has {size} ranks")

    async def _republish(self) -> None:
        await self.learners.republish(self.position.iteration)

    async def _tell_learners(self, checkpoint: Checkpoint) -> None:
        with contextlib.suppress(LearnerRestartedError):
            # A mailbox that is being restarted is told by whoever recovers it.
            await self.learners.resume_from(str(checkpoint.folder.resolve()), checkpoint.state.iteration)

    # --- looking at it and changing it --------------------------------------------------------------------------

    def _snapshot(self) -> RunSnapshot:
        held, ranks = self.batches.buffer.held(), self.config.pools.learner.num_workers
        learner = PoolSnapshot(
            wanted=self._wanted_ranks, present=ranks if self.learners.has_joined else 0, working=None,
            busy=self.journal.learner_busy, members={},
        )  # fmt: skip
        return RunSnapshot(
            phase=self.journal.phase,
            version=self.position.iteration,
            iterations=self.config.iterations,
            pools={**self.pools.status(), "learner": learner},
            groups=held.groups,
            nbytes=held.nbytes,
            last=self.journal.last,
        )

    def _resize(self, role: str, size: int) -> None:
        sharing = self.config.pools.learner.sequence_parallel
        if role == "learner" and size % sharing:
            self.journal.say(
                f"the learner group keeps its size: {size} ranks are no multiple of "
                f"pools.learner.sequence_parallel ({sharing})"
            )
        elif role == "learner":
            # Between two iterations, see resize_learners.
            self._wanted_ranks = size
        else:
            self.pools.resize(role, size)

"""The refresh of the process reward model during a run, if the recipe has one (``rewards.process.refresh``).

After every iteration the refresh actor, a pool of one, gets the iteration's samples; when a refresh is due it trains on
its buffer, and the PRM servers get the new weights. It trains for a few seconds a call, so that a stop is noticed
meanwhile: the checkpoint then says that the refresh is due, and it is made when the run is resumed.

Waits for: the actor, for each answer ``pools.learner.update_timeout_s`` at most. An actor that was lost comes back
without its samples, and restores those of the last checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import ray

from euphonium.config import RunConfig
from euphonium.errors import LateError, LostActorError, TrainingError
from euphonium.rewards.total import weighted_total
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import Array, GroupPayload
from euphonium.wire.roles import PrmRefresher, PrmServer
from orchestrator.groups.credit import Batch
from orchestrator.pools.run_pools import RunPools
from orchestrator.state.interruption import Interruption, StopRequestedError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

log = logging.getLogger(__name__)

_T = TypeVar("_T")
# References to a group's final latents and to its transitions, and its weighted outcome rewards.
Replayed = tuple["ObjectRef[Array]", "ObjectRef[GroupPayload]", Array]

FOLDER = "process_reward"
PIECE_S = 2.0


class ProcessRewardRefresh:
    """Gives samples to the refresh actor, and its newest weights to the PRM servers."""

    def __init__(
        self,
        config: RunConfig,
        pools: RunPools,
        interruption: Interruption,
        newest_checkpoint: Callable[[], Path | None],
        say: Callable[[str], None],
    ) -> None:
        """Creates the refresh; no actor is called.

        Args:
            config: configuration of the run.
            pools: the run's pools; without a refresh in the recipe there is no refresh actor, and nothing is done.
            interruption: interrupts the waits for a refresh.
            newest_checkpoint: returns the folder of the checkpoint that a lost actor restores, or None.
            say: prints a line.
        """
        self._config = config
        self._pools = pools
        self._interruption = interruption
        self._newest_checkpoint = newest_checkpoint
        self._say = say
        # A task on the node that holds the transitions, so that only the prompt's embeddings travel.
        self._conditioning = ray.remote(_conditioning).options(num_cpus=0)
        self._version = 0

    async def restore(self) -> None:
        """Has the actor restore the newest checkpoint, and make a refresh that was due in it.

        Called at the start of a run, and after it went back to a checkpoint.

        Raises:
            StopRequestedError: a stop was requested during the refresh.
            TrainingError: the actor does not answer.
        """
        pool = self._pools.prm_refresh
        if pool is None:
            return
        async with pool.exclusive(0) as member:
            await self._restore(member.handle)
            await self._train(member.handle)
            await self._publish(member.handle)

    async def follow(self, iteration: int, batch: Batch, checkpoint: Path | None) -> dict[str, float]:
        """After an iteration: gives its groups to the actor, makes a refresh that is due, and writes to a checkpoint.

        Args:
            iteration: number of the iteration, from 1.
            batch: the iteration's groups.
            checkpoint: folder of a checkpoint that is being written, or None.

        Returns:
            Metrics; empty without a refresh in the recipe.

        Raises:
            TrainingError: the actor was lost in all of ``rewards.attempts`` attempts, or its loss is not finite.
        """
        if self._pools.prm_refresh is None:
            return {}
        rewards, size = self._config.rewards.outcome, self._config.rollout.group_size
        return await self.step(
            iteration,
            [(g.latents, g.payload, weighted_total(g.scores, rewards, size)) for g in batch.groups],
            checkpoint,
        )

    async def save(self, checkpoint: Path) -> None:
        """Writes the actor's part of a checkpoint outside of an iteration; a refresh that is due stays due.

        Raises:
            TrainingError: the actor does not answer.
        """
        pool = self._pools.prm_refresh
        if pool is not None:
            async with pool.exclusive(0) as member:
                await self._save(member.handle, checkpoint)

    async def step(self, iteration: int, groups: Sequence[Replayed], checkpoint: Path | None) -> dict[str, float]:
        """:meth:`follow`, given references to what the actor needs of each group."""
        pool = self._pools.prm_refresh
        assert pool is not None
        began = time.monotonic()
        failure: TrainingError | None = None
        for _ in range(self._config.rewards.attempts):
            async with pool.exclusive(0) as member:
                try:
                    if failure is not None:
                        self._say(
                            f"the refresh of the process reward model was lost and goes on from the last checkpoint, "
                            f"without the samples since ({failure})"
                        )
                        await self._restore(member.handle)
                    metrics = await self._step(member.handle, iteration, groups, checkpoint)
                except LostActorError as error:
                    failure = error
                    pool.lose(member, kill=isinstance(error, LateError))
                else:
                    return {**metrics, "time/prm_refresh_s": time.monotonic() - began}
        assert failure is not None
        raise failure

    async def _step(
        self, actor: ActorProxy[PrmRefresher], iteration: int, groups: Sequence[Replayed], checkpoint: Path | None
    ) -> dict[str, float]:
        added = [
            actor.add.remote(iteration, latents, np.asarray(totals), self._conditioning.remote(payload))
            for latents, payload, totals in groups
        ]
        await asyncio.gather(*(self._wait(ref) for ref in added))
        await self._wait(actor.begin.remote(iteration))
        metrics: dict[str, float] = {}
        # The policy's update is done: a stop must not keep the iteration from being committed.
        with contextlib.suppress(StopRequestedError):
            metrics = await self._train(actor)
        if checkpoint is not None:
            await self._save(actor, checkpoint)
        await self._publish(actor)
        return metrics

    async def _train(self, actor: ActorProxy[PrmRefresher]) -> dict[str, float]:
        """Has the actor finish a refresh that is due; returns its metrics, empty if none was due."""
        began = time.monotonic()
        while True:
            self._interruption.raise_if_requested()
            self._version, metrics = await self._interruption.interruptible(self._wait(actor.go_on.remote(PIECE_S)))
            if metrics is None:
                continue
            if "process/refresh_pairs" in metrics:
                pairs, seconds = metrics["process/refresh_pairs"], time.monotonic() - began
                self._say(f"process reward model refreshed on {pairs:.0f} pairs in {seconds:.0f} s")
            return metrics

    async def _save(self, actor: ActorProxy[PrmRefresher], checkpoint: Path) -> None:
        await self._wait(actor.save.remote(str((checkpoint / FOLDER).resolve())))

    async def _restore(self, actor: ActorProxy[PrmRefresher]) -> None:
        newest = self._newest_checkpoint()
        folder = str(newest / FOLDER) if newest is not None else None
        self._version = await self._wait(actor.restore.remote(folder))

    async def _publish(self, actor: ActorProxy[PrmRefresher]) -> None:
        """Sends the newest weights to servers with other ones: all after a refresh, else those that were restarted."""
        servers: Sequence[ActorProxy[PrmServer]] = self._pools.prm.reachable_handles if self._pools.prm else []
        versions = await asyncio.gather(*(self._asked(server.weights_version.remote()) for server in servers))
        behind = [s for s, version in zip(servers, versions, strict=True) if version not in (None, self._version)]
        if behind:
            weights = actor.weights.remote()
            await self._wait(weights)
            await asyncio.gather(*(self._asked(s.load_weights.remote(self._version, weights)) for s in behind))

    async def _asked(self, ref: Awaitable[_T]) -> _T | None:
        """A server's answer; None if it is down, in which case it is asked again after the next iteration."""
        try:
            return await self._wait(ref)
        except TrainingError as error:
            log.warning("a PRM server keeps its old weights for now: %s", error)
            return None

    async def _wait(self, ref: Awaitable[_T]) -> _T:
        timeout = self._config.pools.learner.update_timeout_s
        return await awaited(ref, timeout, "an answer of the process reward model's refresh")


def _conditioning(payload: GroupPayload) -> dict[str, Array]:
    return payload.conditioning

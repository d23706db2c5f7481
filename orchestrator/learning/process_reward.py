"""The refresh of the process reward model in a run: what its actor is told, and which servers have which weights."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import Array, GroupPayload

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

    from euphonium.wire.roles import PrmRefresher, PrmServer

log = logging.getLogger(__name__)

_T = TypeVar("_T")

FOLDER = "process_reward"


class RefreshHandle:
    """Feeds the refresh actor and keeps the PRM servers on its newest weights."""

    def __init__(self, config: RunConfig, actor: ActorProxy[PrmRefresher]) -> None:
        """A handle on an actor that was started by its pool.

        Args:
            config: of the run.
            actor: that refreshes. When it was restarted it has forgotten its replay: :meth:`restore` gives it back.
        """
        import ray

        self._timeout = config.pools.learner.update_timeout_s
        self._actor = actor
        # Wherever the transitions lie; only the prompt's embeddings travel.
        self._conditioning = ray.remote(_conditioning).options(num_cpus=0)
        self._version = 0

    async def restore(self, checkpoint: Path | None, servers: Sequence[ActorProxy[PrmServer]]) -> None:
        """Takes up a checkpoint's model and replay, at the start and after a rewind."""
        folder = str(checkpoint / FOLDER) if checkpoint is not None else None
        self._version = await self._wait(self._actor.restore.remote(folder))
        await self._publish(servers)

    async def step(
        self,
        iteration: int,
        groups: Sequence[tuple[ObjectRef[Array], ObjectRef[GroupPayload], Array]],
        servers: Sequence[ActorProxy[PrmServer]],
        folder: Path | None,
    ) -> dict[str, float]:
        """After an iteration: replays its groups, refreshes if it is time, publishes, saves.

        Args:
            iteration: from 1.
            groups: references to final latents and to transitions, and weighted outcome rewards.
            servers: handles of the PRM servers.
            folder: of the checkpoint that is being written, or None.

        Returns:
            Metrics.
        """
        began = time.monotonic()
        added = [
            self._actor.add.remote(iteration, latents, np.asarray(totals), self._conditioning.remote(payload))
            for latents, payload, totals in groups
        ]
        target = None
        if folder is not None:
            target = str((folder / FOLDER).resolve())
        step = self._actor.step.remote(iteration, target)
        await asyncio.gather(*(self._wait(ref) for ref in added))
        self._version, metrics = await self._wait(step)
        await self._publish(servers)
        return {**metrics, "time/prm_refresh_s": time.monotonic() - began}

    async def _publish(self, servers: Sequence[ActorProxy[PrmServer]]) -> None:
        """Sends weights to the servers that have others: after a refresh all, else those that were restarted."""
        versions = await asyncio.gather(*(self._asked(server.weights_version.remote()) for server in servers))
        behind = [s for s, version in zip(servers, versions, strict=True) if version not in (None, self._version)]
        if behind:
            weights = self._actor.weights.remote()
            await self._wait(weights)
            await asyncio.gather(*(self._asked(s.load_weights.remote(self._version, weights)) for s in behind))

    async def _asked(self, ref: Awaitable[_T]) -> _T | None:
        """A server's answer; None from one that is down, which is asked again after the next iteration."""
        try:
            return await self._wait(ref)
        except TrainingError as error:
            log.warning("a PRM server keeps its old weights for now: %s", error)
            return None

    async def _wait(self, ref: Awaitable[_T]) -> _T:
        return await awaited(ref, self._timeout, "an answer of the process reward model's refresh")


def _conditioning(payload: GroupPayload) -> dict[str, Array]:
    return payload.conditioning

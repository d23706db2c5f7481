"""Pools of Ray actors: made, awaited, handed out, and watched."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from core.config import PoolConfig
from core.deadlines import describe
from core.errors import ResourcesError, TrainingError

log = logging.getLogger(__name__)

SAY_EVERY_S = 15.0


class ActorPool:
    """Actors of one role.

    Attributes:
        role: name of the pool.
        names: of its actors, ``<role>-<index>``.
        handles: their Ray handles.
    """

    def __init__(self, role: str, config: PoolConfig, make: Callable[[int], tuple[type, tuple[Any, ...]]]) -> None:
        import ray

        self.role = role
        self.config = config
        self.names = [f"{role}-{index}" for index in range(config.num_actors)]
        self.handles: list[Any] = []
        self._next = 0
        for index, name in enumerate(self.names):
            cls, arguments = make(index)
            actor = ray.remote(cls).options(
                name=name,
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                resources=dict(config.resources) or None,
                max_restarts=config.max_restarts,
                # A lost call must come back as an error: whoever made it decides what is safe to repeat.
                max_task_retries=0,
            )
            self.handles.append(actor.remote(*arguments))
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        for handle in self.handles:
            self._idle.put_nowait(handle)

    def next(self) -> Any:
        """Actors in turn, for roles that queue requests themselves."""
        handle = self.handles[self._next % len(self.handles)]
        self._next += 1
        return handle

    async def acquire(self, timeout_s: float) -> Any:
        """An idle actor, for roles that do one thing at a time; give it back with :meth:`release`.

        Raises:
            TrainingError: none came free in time.
        """
        try:
            return await asyncio.wait_for(self._idle.get(), timeout_s)
        except TimeoutError as error:
            raise TrainingError(f"no {self.role} actor came free within {timeout_s:.0f} s") from error

    def release(self, handle: Any) -> None:
        """Makes an actor available again."""
        self._idle.put_nowait(handle)

    def demand(self) -> dict[str, float]:
        """Resources that the whole pool reserves."""
        each = {"CPU": self.config.num_cpus, "GPU": self.config.num_gpus, **self.config.resources}
        return {name: amount * self.config.num_actors for name, amount in each.items() if amount}


async def wait_ready(pools: Sequence[ActorPool], timeout_s: float, say: Callable[[str], None]) -> None:
    """Waits until every actor has loaded its models, saying every few seconds who is missing.

    Raises:
        ResourcesError: actors could not be placed in time; says what they need and what the cluster has.
        TrainingError: an actor failed to start.
    """
    import ray

    waiting = {
        handle.ready.remote(): name for pool in pools for name, handle in zip(pool.names, pool.handles, strict=True)
    }
    began = said = time.monotonic()
    while waiting:
        done, _ = await asyncio.to_thread(ray.wait, list(waiting), num_returns=1, timeout=1.0)
        for ref in done:
            name = waiting.pop(ref)
            try:
                await ref
            except ray.exceptions.RayTaskError as error:
                raise TrainingError(f"{name} failed to start: {error.cause}") from error
            except ray.exceptions.RayError as error:
                raise TrainingError(f"{name} failed to start: {describe(error)}") from error
        now = time.monotonic()
        if waiting and now - began > timeout_s:
            raise ResourcesError(_missing(pools, sorted(waiting.values()), timeout_s))
        if waiting and now - said > SAY_EVERY_S:
            said = now
            say(f"waiting for {', '.join(sorted(waiting.values()))} ({now - began:.0f} s)")


def _missing(pools: Sequence[ActorPool], names: list[str], timeout_s: float) -> str:
    import ray

    demand: dict[str, float] = {}
    for pool in pools:
        for name, amount in pool.demand().items():
            demand[name] = demand.get(name, 0.0) + amount
    total, free = ray.cluster_resources(), ray.available_resources()
    lines = [
        f"{name}: the pools reserve {amount:g}, the cluster has {total.get(name, 0):g}, {free.get(name, 0):g} free"
        for name, amount in sorted(demand.items())
    ]
    return (
        f"{', '.join(names)} did not start within {timeout_s:.0f} s. " + "; ".join(lines)
        + ". Add nodes, make pools smaller, or raise pools.start_timeout_s"
    )  # fmt: skip

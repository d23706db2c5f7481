"""Waiting for the pools to start, with a deadline, and with messages that say which actors are missing and why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from euphonium.errors import ResourcesError
from orchestrator.pools.actor_pool import ActorPool
from orchestrator.pools.resources import autoscaler_says, free_resources, lacking_resources

SAY_EVERY_S = 15.0


async def wait_started(pools: Sequence[ActorPool[Any]], timeout_s: float, say: Callable[[str], None]) -> None:
    """Waits until every actor has loaded its models; prints every few seconds which are missing.

    Args:
        pools: pools that have been started.
        timeout_s: longest wait for all of them.
        say: prints a line.

    Raises:
        ResourcesError: actors are still missing; says which, what they need, and what the cluster has.
        TrainingError: an actor failed to start.
    """
    began = time.monotonic()
    started = asyncio.gather(*(pool.wait_started() for pool in pools))
    try:
        while True:
            left = began + timeout_s - time.monotonic()
            await asyncio.wait([started], timeout=min(SAY_EVERY_S, left))
            if started.done():
                await started
                return
            if left <= SAY_EVERY_S:
                raise ResourcesError(
                    f"{_missing(pools)} did not start within {timeout_s:.0f} s; {_reserved(pools)}. Add nodes, "
                    "make pools smaller, or raise pools.start_timeout_s"
                )
            say(f"waiting for {_missing(pools)} ({time.monotonic() - began:.0f} s); {_state(pools)}")
    finally:
        started.cancel()
        # What nobody takes from a gathering that was given up is printed as an error of its own.
        await asyncio.gather(started, return_exceptions=True)


def _missing(pools: Sequence[ActorPool[Any]]) -> str:
    """The missing actors of every pool, such as ``4 of 8 rollout actors (rollout-4, ...)``."""
    return " and ".join(
        f"{len(pool.roster.starting)} of {len(pool.roster.members)} {pool.spec.role} actors "
        f"({', '.join(sorted(member.name for member in pool.roster.starting))})"
        for pool in sorted(pools, key=lambda pool: pool.spec.role)
        if pool.roster.starting
    )


def _state(pools: Sequence[ActorPool[Any]]) -> str:
    """Why they are missing, as far as it shows: one more of each would still find room if they do."""
    for pool in pools:
        one = {name: amount / len(pool.roster.members) for name, amount in pool.demand().items()}
        if pool.roster.starting and (pool.spec.config.labels or lacking_resources(one)):
            return _reserved(pools)
    return "they have room in the cluster, and load their models"


def _reserved(pools: Sequence[ActorPool[Any]]) -> str:
    demand: dict[str, float] = {}
    for pool in pools:
        for name, amount in pool.demand().items():
            demand[name] = demand.get(name, 0.0) + amount
    labelled = [
        f"{pool.spec.role} actors need a node with the labels {pool.spec.config.labels}"
        for pool in pools
        if pool.spec.config.labels
    ]
    return "; ".join(clause for clause in (free_resources(demand), *labelled, autoscaler_says()) if clause)

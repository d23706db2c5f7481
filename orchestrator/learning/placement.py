"""The learner group's reservation: its placement group, which Ray makes as a whole or not at all.

Actors that are placed one by one, on parts of GPUs, may leave no GPU with room for a rank. So they are started once the
learner group has its places. Ray Train makes the placement group itself and tells nobody its name: it is the one that
was not there before and asks for what the ranks reserve.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Set
from typing import Any, TypeVar

from euphonium.config import TrainingGroupConfig
from euphonium.errors import ResourcesError, TrainingError
from orchestrator.pools.resources import autoscaler_says, free_resources

LOOK_EVERY_S, SAY_EVERY_S = 0.2, 15.0

_T = TypeVar("_T")


def placement_groups() -> set[str]:
    """Ids of all placement groups of the cluster, past ones included."""
    from ray.util.placement_group import placement_group_table

    return set(placement_group_table())


async def told_meanwhile(
    joined: Awaitable[_T], pool: TrainingGroupConfig, say: Callable[[str], None], every_s: float = SAY_EVERY_S
) -> _T:
    """Awaits a learner group that has been started; prints every few seconds what it waits for.

    Args:
        joined: returns when the group can take orders.
        pool: the group's size, and the resources of each rank.
        say: prints a line.
        every_s: seconds between lines.

    Raises:
        ResourcesError: it did not start, and there is no room for it.
        TrainingError: it did not start for another reason.
    """
    began = time.monotonic()
    joining = asyncio.ensure_future(joined)
    try:
        while not (await asyncio.wait([joining], timeout=every_s))[0]:
            lacks = await asyncio.to_thread(_lacks_places, pool)
            places = f"; its ranks have no room: {lacks}" if lacks else ""
            say(f"waiting for the learner group ({time.monotonic() - began:.0f} s){places}")
        return await joining
    except TrainingError as error:
        if lacks := await asyncio.to_thread(_lacks_places, pool):
            raise _no_room(pool, lacks) from error
        raise
    finally:
        joining.cancel()


def _lacks_places(pool: TrainingGroupConfig) -> str:
    """What a learner group lacks that waits for its places; empty if none waits."""
    from ray.util.placement_group import placement_group_table

    waits = any(
        group["state"] == "PENDING" and _asks_for(group["bundles"], pool) for group in placement_group_table().values()
    )
    return _lacks(pool) if waits else ""


async def wait_placed(pool: TrainingGroupConfig, others: Set[str], say: Callable[[str], None]) -> None:
    """Waits until a learner group that has been started has its places; at once if its ranks take no GPU.

    Args:
        pool: the group's size, and the resources of each rank.
        others: the placement groups from before it was started.
        say: prints a line.

    Raises:
        ResourcesError: there is no room for it within ``pools.learner.start_timeout_s``.
    """
    if not pool.num_gpus:
        return
    began = said = time.monotonic()
    while not await asyncio.to_thread(_is_placed, pool, others):
        now = time.monotonic()
        if now - began > pool.start_timeout_s:
            raise _no_room(pool, _lacks(pool))
        if now - said > SAY_EVERY_S:
            said = now
            say(f"waiting for the places of the learner group ({now - began:.0f} s); {_lacks(pool)}")
        await asyncio.sleep(LOOK_EVERY_S)


def _is_placed(pool: TrainingGroupConfig, others: Set[str]) -> bool:
    from ray.util.placement_group import placement_group_table

    return any(
        name not in others and group["state"] == "CREATED" and _asks_for(group["bundles"], pool)
        for name, group in placement_group_table().items()
    )


def _asks_for(bundles: dict[int, dict[str, Any]], pool: TrainingGroupConfig) -> bool:
    def reserves_as_much(bundle: dict[str, Any]) -> bool:
        # Ray counts ten-thousandths.
        each = pool.reserved
        return bundle.keys() == each.keys() and all(math.isclose(bundle[k], each[k], abs_tol=1e-4) for k in each)

    return len(bundles) == pool.num_workers and all(map(reserves_as_much, bundles.values()))


def _no_room(pool: TrainingGroupConfig, lacks: str) -> ResourcesError:
    return ResourcesError(
        f"no room for the learner group within {pool.start_timeout_s:.0f} s; {lacks}. Add nodes, have the pools "
        "reserve less (num_cpus, num_gpus), make pools.learner smaller, or raise pools.learner.start_timeout_s"
    )


def _lacks(pool: TrainingGroupConfig) -> str:
    demand = {name: each * pool.num_workers for name, each in pool.reserved.items()}
    clauses = [free_resources(demand)]
    if pool.num_gpus:
        clauses.append(f"each of {pool.num_workers} ranks takes {pool.num_gpus:g} of one GPU")
    if pool.labels:
        clauses.append(f"on nodes with the labels {pool.labels}")
    return "; ".join(clause for clause in (*clauses, autoscaler_says()) if clause)

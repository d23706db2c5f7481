"""Placement of a pool on a real cluster."""

import asyncio
from typing import Any

import pytest

from euphonium.config import PoolConfig
from euphonium.errors import ResourcesError
from orchestrator.pools.pools import ActorPool, wait_ready

pytestmark = pytest.mark.ray


class Idle:
    """An actor that does nothing."""

    async def ready(self) -> dict[str, Any]:
        return {"node": "here"}


def pool_of(role: str, config: PoolConfig) -> ActorPool:
    return ActorPool(role, config, lambda i: (Idle, ()))


@pytest.mark.usefixtures("ray_cluster")
def test_waiting_for_actors_that_have_no_place_ends_and_says_what_is_missing() -> None:
    fits = pool_of("idle", PoolConfig(num_cpus=0))
    lacking = pool_of(
        "far", PoolConfig(num_actors=2, num_cpus=0, resources={"warp_drive": 1}, labels={"pool": "reward"})
    )
    said: list[str] = []
    with pytest.raises(ResourcesError) as error:
        asyncio.run(wait_ready([fits, lacking], 5.0, said.append))
    for text in (
        "2 of 2 far actors (far-0, far-1) did not start within 5 s",
        "warp_drive: the pools reserve 2, the cluster has 0, 0 free",
        "far actors need a node with the labels {'pool': 'reward'}",
        "Add nodes, make pools smaller, or raise pools.start_timeout_s",
    ):
        assert text in str(error.value)
    assert "autoscaler" not in str(error.value)
    assert [member.state for member in fits.members] == ["present"]

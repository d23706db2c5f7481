"""A learner group on CPUs that finds no room: what is said of it meanwhile, and in the end."""

import asyncio
from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from euphonium.errors import ResourcesError, TrainingError
from orchestrator.learning.placement import told_meanwhile

pytestmark = pytest.mark.ray


def test_ranks_on_cpus_without_room_are_told_and_refused(
    make_config: Callable[..., RunConfig], ray_cluster: None
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    pool = make_config("pools.learner.num_workers=2", "pools.learner.num_cpus=90").pools.learner
    said: list[str] = []

    async def late() -> int:
        await asyncio.sleep(0.3)
        raise TrainingError("the learner group did not start")

    async def in_time() -> int:
        await asyncio.sleep(0.15)
        return 7

    group = placement_group([pool.reserved] * 2)
    try:
        with pytest.raises(
            ResourcesError, match=r"^no room.*CPU: the pools reserve 180, the cluster has [^;]* free\. Add"
        ):
            asyncio.run(told_meanwhile(late(), pool, said.append, 0.1))
    finally:
        remove_placement_group(group)
    assert "; its ranks have no room: CPU: the pools reserve 180" in said[0]
    assert "GPU" not in said[0]

    said.clear()
    with pytest.raises(TrainingError, match=r"^the learner group did not start$"):
        asyncio.run(told_meanwhile(late(), pool, said.append, 0.1))
    assert asyncio.run(told_meanwhile(in_time(), pool, said.append, 0.1)) == 7
    assert set(said) == {"waiting for the learner group (0 s)"}

"""Pools of real actors: placement, start, loss, return, and being given up."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from euphonium.config import PoolConfig
from euphonium.errors import ResourcesError, TrainingError
from euphonium.wire.records import Readiness
from euphonium.wire.roles import PoolMember, start_actor
from orchestrator.pools import start_up
from orchestrator.pools.actor_pool import ActorPool
from orchestrator.pools.start_up import wait_started
from orchestrator.pools.supervisor import PoolSpec

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Idle:
    """An actor that does nothing."""

    async def ready(self) -> Readiness:
        return Readiness(device="cpu", node="here")

    def pid(self) -> int:
        return os.getpid()


class Unready(Idle):
    """An actor that cannot load its model."""

    async def ready(self) -> Readiness:
        raise OSError("the weights are damaged")


class Slow(Idle):
    """An actor that takes a while to load its model."""

    async def ready(self) -> Readiness:
        await asyncio.sleep(2)
        return await super().ready()


class Crashing(Idle):
    """An actor whose constructor fails."""

    def __init__(self) -> None:
        raise OSError("no such device")


def pool_of(role: str, cls: type = Idle, *, clients: Sequence[ActorPool[Any]] = (), **share: Any) -> ActorPool[Any]:
    spec = PoolSpec(
        role=role, config=PoolConfig(**{"num_cpus": 0, **share}),
        factory=lambda _, options: start_actor(PoolMember, cls, options),
        start_timeout_s=60.0, rejoin_timeout_s=60.0,
    )  # fmt: skip
    return ActorPool(spec, [].append, clients)


def run(pools: list[ActorPool[Any]], work: Callable[[], Awaitable[None]]) -> None:
    """Starts pools, works with them, and takes their actors away."""
    import ray

    async def both() -> None:
        for pool in pools:
            pool.start()
        try:
            await asyncio.wait_for(work(), 120)
        finally:
            for pool in pools:
                pool.stop()
                for member in pool.roster.members:
                    ray.kill(member.handle)

    asyncio.run(both())


def test_a_pool_that_is_not_started_needs_no_actor() -> None:
    pool = pool_of("never", num_actors=2, resources={"warp_drive": 1})
    assert (pool.roster.members, pool.demand()) == ([], {"warp_drive": 0})


def test_waiting_for_actors_that_have_no_place_ends_and_says_what_is_missing() -> None:
    fits = pool_of("idle")
    lacking = pool_of("far", num_actors=2, resources={"warp_drive": 1}, labels={"pool": "reward"})
    said: list[str] = []

    async def wait() -> None:
        with pytest.raises(ResourcesError) as error:
            await wait_started([fits, lacking], 5.0, said.append)
        for text in (
            "2 of 2 far actors (far-0, far-1) did not start within 5 s",
            "warp_drive: the pools reserve 2, the cluster has 0, 0 free",
            "far actors need a node with the labels {'pool': 'reward'}",
            "Add nodes, make pools smaller, or raise pools.start_timeout_s",
        ):
            assert text in str(error.value)
        assert "autoscaler" not in str(error.value)
        assert [member.state for member in fits.roster.members] == ["present"]

    run([fits, lacking], wait)


def test_actors_that_have_a_place_and_load_are_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "SAY_EVERY_S", 0.5)
    slow = pool_of("slow", Slow, num_actors=2)
    said: list[str] = []

    async def wait() -> None:
        await wait_started([slow], 60.0, said.append)

    run([slow], wait)
    assert "waiting for 2 of 2 slow actors (slow-0, slow-1)" in said[0]
    assert said[0].endswith("they have room in the cluster, and load their models")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Unready, "the weights are damaged"), (Crashing, "ActorDiedError.*")],
    ids=["that is not ready", "whose constructor fails"],
)
def test_an_actor_that_fails_to_start_ends_the_start(cls: type, reason: str) -> None:
    good, bad = pool_of("good"), pool_of("bad", cls)

    async def wait() -> None:
        with pytest.raises(TrainingError, match=f"bad-0 failed to start: {reason}"):
            await wait_started([good, bad], 60.0, print)

    run([good, bad], wait)


def test_a_killed_actor_is_absent_until_it_answers_again() -> None:
    pool = pool_of("idle", num_actors=2)

    async def lose_one() -> None:
        await pool.wait_started()
        member, other = pool.roster.members
        assert (member.node, member.joins) == ("here", 1)
        before = await member.handle.pid.remote()
        pool.lose(member, kill=True)
        assert (pool.roster.present, pool.roster.reachable) == ([other], [member, other])
        while member.joins < 2:
            await asyncio.sleep(0.1)
        assert pool.roster.present == [member, other]
        assert await member.handle.pid.remote() != before

    run([pool], lose_one)


def test_an_actor_that_may_not_be_restarted_is_given_up_and_the_last_one_ends_the_waits() -> None:
    pool = pool_of("idle", max_restarts=0)

    async def lose_all() -> None:
        await pool.wait_started()
        pool.lose(pool.roster.members[0], kill=True)
        with pytest.raises(TrainingError, match=r"the idle pool has no actor left.*pools.idle.max_restarts \(0\)"):
            async with pool.exclusive(0):
                pass
        assert (pool.roster.members, pool.roster.wanted) == ([], 0)

    run([pool], lose_all)


def test_a_pool_grows_and_shrinks_and_the_last_index_is_never_used_again() -> None:
    pool = pool_of("idle")

    async def change() -> None:
        await pool.wait_started()
        pool.resize(3)
        while len(pool.roster.present) < 3:
            await asyncio.sleep(0.05)
        pool.resize(1)
        while len(pool.roster.members) > 1:
            await asyncio.sleep(0.05)
        pool.resize(2)
        assert [member.name for member in pool.roster.members] == ["idle-0", "idle-3"]
        assert pool.status().wanted == 2

    run([pool], change)


def test_a_server_that_leaves_answers_until_its_clients_have_ended_what_they_were_at() -> None:
    clients = pool_of("client")
    servers = pool_of("server", num_actors=2, clients=[clients])

    async def shrink() -> None:
        await wait_started([clients, servers], 60.0, print)
        async with clients.exclusive(0):
            async with servers.roster.shared():
                servers.resize(1)
                (leaving,) = set(servers.roster.members) - set(servers.roster.staying)
            await asyncio.sleep(0.2)
            assert await leaving.handle.pid.remote() > 0
        while len(servers.roster.members) > 1:
            await asyncio.sleep(0.05)

    run([clients, servers], shrink)

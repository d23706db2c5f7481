"""Which pools a run has, what each of them takes, and in which order they start; there are no actors."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from euphonium.config import RunConfig
from orchestrator.pools.roster import Member
from orchestrator.pools.run_pools import ActorFactories, RunPools
from orchestrator.report.tracking import Progress

MakeConfig = Callable[..., RunConfig]
REFRESH = "rewards.process.refresh.every=2"


def nobody(index: int, options: Any) -> Any:
    raise AssertionError("no actor is started")


def pools_of(config: RunConfig, *roles: str) -> RunPools:
    return RunPools(config, ActorFactories(**dict.fromkeys(roles, nobody)), Progress(1, 0))


def test_a_run_has_the_pools_that_it_has_actors_for_and_starts_those_that_are_asked_first(
    make_config: MakeConfig,
) -> None:
    pools = pools_of(make_config(), "rollout", "orm")
    assert (list(pools), pools.prm, pools.prm_refresh) == (["orm", "rollout"], None, None)
    everything = pools_of(make_config(REFRESH), "rollout", "orm", "prm", "prm_refresh")
    assert list(everything) == ["prm", "prm_refresh", "orm", "rollout"]
    assert everything["prm"] is everything.prm
    assert not any(pool.roster.members for pool in everything.values())


def test_prm_servers_alone_are_spread_over_the_nodes(make_config: MakeConfig) -> None:
    pools = pools_of(make_config(REFRESH), "rollout", "orm", "prm", "prm_refresh")
    assert {role for role, pool in pools.items() if pool.spec.spread} == {"prm"}


def test_the_refresh_is_one_actor_that_takes_what_a_prm_server_takes_unless_it_has_a_share_of_its_own(
    make_config: MakeConfig,
) -> None:
    shared = make_config(REFRESH, "pools.prm.num_actors=3", "pools.prm.threads=4", "pools.prm.max_restarts=7")
    spec = pools_of(shared, "rollout", "orm", "prm", "prm_refresh")["prm_refresh"].spec
    assert (spec.config.num_actors, spec.config.num_cpus, spec.config.threads, spec.config.max_restarts) == (
        1, 0.1, 4, 7,
    )  # fmt: skip
    own = make_config(REFRESH, "pools.prm.threads=4", "pools.prm_refresh.num_gpus=1")
    pools = pools_of(own, "rollout", "orm", "prm", "prm_refresh")
    assert pools["prm_refresh"].spec.config.reserved == {"CPU": 1.0, "GPU": 1.0}
    assert pools["prm"].spec.config.reserved == {"CPU": 0.1}


def test_the_refresh_is_shown_but_is_no_pool_that_changes_its_size(make_config: MakeConfig) -> None:
    pools = pools_of(make_config(REFRESH), "rollout", "orm", "prm", "prm_refresh")
    pools.resize("prm_refresh", 2)
    pools.resize("no such pool", 2)
    assert pools["prm_refresh"].roster.wanted == 0
    assert set(pools.status()) == {"prm", "prm_refresh", "orm", "rollout"}
    assert set(pools.load()) == {f"{what}/{role}" for what in ("busy", "pool") for role in ("prm", "orm", "rollout")}


@pytest.mark.parametrize(("transport", "receivers"), [("object_store", ()), ("collective", ("rollout-1",))])
def test_a_broadcast_of_weights_reaches_the_rollout_actors_that_are_present(
    make_config: MakeConfig, transport: str, receivers: tuple[str, ...]
) -> None:
    pools = pools_of(make_config(f"pools.learner.weight_transport={transport}"), "rollout", "orm")
    for i in (0, 1):
        pools.rollout.roster.add(Member(f"rollout-{i}", None))
    asyncio.run(pools.rollout.roster.join(pools.rollout.roster.members[1]))
    assert pools.weight_receivers() == receivers


def test_the_largest_shares_of_gpus_are_started_first(make_config: MakeConfig) -> None:
    """Ray fills up one GPU after another: small shares that come first would leave no room for large ones."""
    started: list[str] = []

    class Starting:
        """An actor that never comes up."""

        def __init__(self, name: str) -> None:
            started.append(name)
            self.ready = self

        def remote(self) -> Any:
            return asyncio.get_running_loop().create_future()

    shares = ("pools.rollout.num_gpus=0.3", "pools.prm.num_gpus=0.1", "pools.orm.num_gpus=0.2")
    roles = dict.fromkeys(("rollout", "orm", "prm"), lambda _i, options: Starting(options["name"]))
    pools = RunPools(make_config(*shares), ActorFactories(**roles), Progress(1, 0))

    async def start() -> None:
        pools.start()
        pools.stop()

    asyncio.run(start())
    assert started == ["rollout-0", "rollout-1", "orm-0", "prm-0"]

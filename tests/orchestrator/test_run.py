"""The run loop: order, staleness, loss of every role, pools that change. Roles are stubs whose numbers form a chain."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from orchestrator.pools.ray_session import CONTROL
from orchestrator.pools.run_pools import ActorFactories
from orchestrator.run import BALANCER, Run
from orchestrator.state.checkpoints import CheckpointStore
from tests.process import actor_process, forget_last_evaluation
from tests.stubs.roles import StubLearners, StubRun

pytestmark = pytest.mark.ray


def records(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def chain(config: RunConfig) -> list[tuple[float, ...]]:
    """What the iterations' groups and weights were, as numbers that any slip would change."""
    keys = ("iteration", "reward/icon/mean", "reward/motion/mean", "policy/loss", "advantage/std")
    return [tuple(record[key] for key in keys) for record in records(config)[1:]]


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    return {}


@pytest.fixture
def expected(unbroken: dict, stub_config: Callable, execute: Callable, tmp_path: Path) -> list:
    """The chain of a run that nothing happens to."""
    if not unbroken:
        config = stub_config(f"output_dir={tmp_path}/unbroken")
        execute(StubRun(config, "tests", None))
        unbroken["chain"] = chain(config)
        unbroken["records"] = records(config)
    return unbroken["chain"]


def test_a_run_is_on_policy_by_default(expected: list, unbroken: dict) -> None:
    assert [row[0] for row in expected] == list(range(1, 9))
    assert len({row[3] for row in expected}) == 8
    for record in unbroken["records"][1:]:
        assert record["staleness/max"] == 0
        assert record["buffer/groups"] == 3
        assert record["pool/rollout"] == 2
        assert 0 <= record["busy/rollout"] <= 1
        assert 0 < record["busy/learner"] <= 1


def test_rollouts_overlap_updates_within_the_bound(stub_config: Callable, execute: Callable) -> None:
    class Slow(StubRun):
        rollout_s, update_s = 0.3, 0.8

    took = {}
    for staleness in (0, 1):
        config = stub_config(f"name=s{staleness}", f"rollout.max_staleness={staleness}", "checkpoint.every=100")
        execute(Slow(config, "tests", None))
        lags = [record["staleness/max"] for record in records(config)[1:]]
        assert max(lags) == staleness
        assert lags[0] == 0
        took[staleness] = sum(record["time/iteration_s"] for record in records(config)[3:])
    # Three groups on two actors take 0.6 s, the update 0.8 s: 1.4 s in turns, 0.8 s overlapped.
    assert took[1] < 0.8 * took[0]


def test_a_small_buffer_holds_drawing_back_but_not_up(stub_config: Callable, execute: Callable) -> None:
    config = stub_config("rollout.max_staleness=3", "rollout.buffer_groups=4", "iterations=6")
    execute(StubRun(config, "tests", None))
    assert [record["iteration"] for record in records(config)] == list(range(7))
    assert all(record["buffer/groups"] <= 4 for record in records(config)[1:])


def test_a_learner_that_dies_in_an_update_repeats_nothing_and_skips_nothing(
    expected: list, stub_config: Callable, execute: Callable
) -> None:
    class Crashing(StubRun):
        crashes = {2, 5, 8}  # noqa: RUF012

    config = stub_config()
    run = Crashing(config, "tests", None)
    execute(run)
    assert run.learners.group.restarts == 3
    assert chain(config) == expected


def test_a_learner_that_dies_while_it_waits_takes_no_plan_of_another_version(
    expected: list, stub_config: Callable, execute: Callable
) -> None:
    class Slow(StubRun):
        rollout_s = 0.3

    async def restart(run: Any) -> None:
        while run.position.iteration < 5:
            await asyncio.sleep(0.02)
        # It joins anew while groups for iteration 6 are drawn, and is back at iteration 3.
        run.learners.group.replaced = True
        run.learners.start(StubLearners(0.05))

    config = stub_config()
    execute(Slow(config, "tests", None), restart)
    assert chain(config) == expected


def test_a_killed_load_balancer_is_replaced_and_no_group_is_lost_meanwhile(
    expected: list, stub_config: Callable, execute: Callable
) -> None:
    class Balanced(StubRun):
        rollout_s, score_s = 0.2, 0.1

        @override
        def actors(self) -> ActorFactories:
            return dataclasses.replace(super().actors(), balancer=Run.actors(self).balancer)

    left: list[dict[str, int]] = []

    async def kill(run: Any) -> None:
        while run.position.iteration < 3:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(kill_process, BALANCER)
        while run.position.iteration < 7:
            await asyncio.sleep(0.02)
        left.append(await run.pools.balancer.outstanding.remote())

    config = stub_config("pools.orm.num_actors=2")
    execute(Balanced(config, "tests", None), kill)
    assert chain(config) == expected
    assert sum(left[0].values()) <= config.rollout.prompts_per_iteration, "what is over no longer counts"


# Roles by the iteration in which each is killed.
KILLED = {"rollout-1": 2, "orm-0": 3, "learner-mailbox": 5, "weight-store": 6}


@pytest.mark.parametrize(
    "roles",
    [pytest.param((role,), id=role, marks=pytest.mark.slow) for role in KILLED]
    + [pytest.param(tuple(KILLED), id="one after another")],
)
@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_roles_are_replaced(
    expected: list, stub_config: Callable, execute: Callable, roles: tuple[str, ...], staleness: int
) -> None:
    class Slow(StubRun):
        rollout_s, restart_s = 0.2, 6.0

    async def kill(run: Any) -> None:
        for role in roles:
            while run.position.iteration < KILLED[role]:
                await asyncio.sleep(0.02)
            await asyncio.to_thread(kill_process, role)

    config = stub_config(f"rollout.max_staleness={staleness}", "rewards.attempts=8")
    run = Slow(config, "tests", None)
    execute(run, kill)
    assert all(len(pool.roster.members) == pool.roster.wanted for pool in run.pools.values()), "nobody was given up"
    if staleness == 0:
        assert chain(config) == expected
    else:
        assert [record["iteration"] for record in records(config)] == list(range(9))
        assert all(record["staleness/max"] <= 1 for record in records(config)[1:])
    assert all(record.get("rollout/dropped_groups", 0) == 0 for record in records(config))


def test_a_buffer_that_dies_while_the_run_starts_is_replaced(
    expected: list, stub_config: Callable, execute: Callable
) -> None:
    async def kill(run: Any) -> None:
        while run.learners.group is None:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(kill_process, "learner-mailbox")

    config = stub_config()
    execute(StubRun(config, "tests", None), kill)
    assert chain(config) == expected


def kill_process(name: str) -> None:
    actor_process(name).kill()


def test_a_pool_without_restarts_goes_on_smaller_and_ends_with_an_error_when_empty(
    stub_config: Callable, execute: Callable
) -> None:
    said: list[str] = []

    async def kill(run: Any) -> None:
        while run.position.iteration < 2:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(kill_process, "rollout-0")
        while len(run.pools["rollout"].roster.members) > 1:
            await asyncio.sleep(0.05)
        before = run.position.iteration
        while run.position.iteration < before + 3:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(kill_process, "rollout-1")

    config = stub_config("pools.rollout.max_restarts=0", "iterations=10000", "rewards.attempts=8")
    run = StubRun(config, "tests", None)
    say = run.journal.progress.say
    run.journal.progress.say = lambda text: (said.append(text), say(text))
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"the rollout pool has no actor left.*pools\.rollout\.max_restarts"):
        execute(run, kill)
    assert time.monotonic() - began < 120
    assert any("rollout-0" in line and "going on with 1 of 1 rollout actors" in line for line in said)


def test_pools_change_while_the_run_goes_on(expected: list, stub_config: Callable, execute: Callable) -> None:
    class Slow(StubRun):
        rollout_s = 0.2

    async def scale(run: Any) -> None:
        import ray

        while run.position.iteration < 2:
            await asyncio.sleep(0.05)
        desk = ray.get_actor(CONTROL)
        await desk.scale.remote({"rollout": 4, "orm": 2, "learner": 2})
        while len(run.pools["rollout"].roster.present) < 4 or len(run.pools["orm"].roster.present) < 2:
            await asyncio.sleep(0.05)
        while run.config.pools.learner.num_workers != 2:
            await asyncio.sleep(0.05)
        await iterations(run, 2)
        while (await desk.status.remote())[0].pools["rollout"].wanted < 4:
            await asyncio.sleep(0.2)
        await desk.scale.remote({"rollout": 1, "orm": 1})
        while len(run.pools["rollout"].roster.members) > 1 or len(run.pools["orm"].roster.members) > 1:
            await asyncio.sleep(0.05)
        with pytest.raises(ray.exceptions.RayTaskError, match="no prm pool"):
            await desk.scale.remote({"prm": 2})
        await iterations(run, 2)
        run.interruption.request()

    async def iterations(run: Any, more: int) -> None:
        before = run.position.iteration
        while run.position.iteration < before + more:
            await asyncio.sleep(0.05)

    config = stub_config("iterations=10000")
    execute(Slow(config, "tests", None), scale)
    everything = records(config)
    # Who draws a group does not change it: the numbers are those of a run of constant pools.
    assert chain(config)[:8] == expected
    assert [record["iteration"] for record in everything] == list(range(len(everything)))
    assert everything[-1]["pool/rollout"] == 1
    assert everything[-1]["pool/learner"] == 2
    assert max(record["pool/rollout"] for record in everything[1:]) == 4
    newest = CheckpointStore(config.run_dir / "checkpoints", 2).newest()
    assert newest is not None
    assert newest.state.world_size == 2


def test_a_stopped_run_goes_on_where_it_was(expected: list, stub_config: Callable, execute: Callable) -> None:
    async def stop(run: Any) -> None:
        while run.position.iteration < 4:
            await asyncio.sleep(0.01)
        run.interruption.request()

    config = stub_config()
    execute(StubRun(config, "tests", None), stop)
    checkpoint = CheckpointStore(config.run_dir / "checkpoints", 2).newest()
    assert checkpoint is not None
    assert 4 <= checkpoint.state.iteration < 8
    assert checkpoint.state.next_group == 3 * checkpoint.state.iteration
    execute(StubRun(config, "stubs", checkpoint))
    assert chain(config) == expected


def test_a_run_that_was_ended_in_its_last_evaluation_makes_up_for_it(stub_config: Callable, execute: Callable) -> None:
    config = stub_config("iterations=3")
    execute(StubRun(config, "tests", None))
    everything = records(config)
    forget_last_evaluation(config.run_dir)
    checkpoint = CheckpointStore(config.run_dir / "checkpoints", 2).newest()
    assert checkpoint is not None
    execute(StubRun(config, "stubs", checkpoint))
    again = records(config)
    assert [record["iteration"] for record in again] == [0, 1, 2, 3]
    assert again[-1]["eval/total/mean"] == pytest.approx(everything[-1]["eval/total/mean"], abs=1e-6)


def test_a_learner_group_that_shares_samples_keeps_to_multiples(
    stub_config: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run = StubRun(stub_config("pools.learner.num_workers=2", "pools.learner.sequence_parallel=2"), "tests", None)
    run._resize("learner", 3)
    assert run._wanted_ranks == 2
    assert "keeps its size: 3 ranks are no multiple of pools.learner.sequence_parallel (2)" in capsys.readouterr().out
    run._resize("learner", 4)
    assert run._wanted_ranks == 4

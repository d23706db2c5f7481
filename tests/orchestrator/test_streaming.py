"""Runs whose learner group begins with the first groups of an iteration have the numbers of runs that wait."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig
from orchestrator.state.checkpoints import CheckpointStore
from tests.process import actor_process
from tests.stubs.roles import StubRun

pytestmark = pytest.mark.ray

SIX = ("rollout.prompts_per_iteration=6", "iterations=5", "checkpoint.every=2", "rewards.attempts=8")


class Streaming(StubRun):
    """Two actors draw six groups in three waves; the learner takes as long for them."""

    rollout_s, update_s = 0.3, 0.9


def records(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()][1:]


def chain(config: RunConfig) -> list[tuple[float, ...]]:
    """What the iterations' groups and weights were, as numbers that any slip would change."""
    keys = ("iteration", "reward/icon/mean", "reward/motion/mean", "policy/loss", "advantage/std")
    return [tuple(record[key] for key in keys) for record in records(config)]


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return {}


@pytest.fixture
def waiting(known: dict, stub_config: Callable, execute: Callable, tmp_path: Path) -> list[tuple[float, ...]]:
    """The chain of a run whose learner group waits for whole batches."""
    if not known:
        config = stub_config(*SIX, f"output_dir={tmp_path}/waiting", "rollout.stream=false")
        run = Streaming(config, "tests", None)
        execute(run)
        assert run.learners.group.beginnings == []
        known["chain"] = chain(config)
        known["seconds"] = [record["time/iteration_s"] for record in records(config)]
    chained: list[tuple[float, ...]] = known["chain"]
    return chained


async def in_a_beginning(run: Any, after: int) -> None:
    """Waits until the learner group has begun with an iteration's first groups."""
    while run.position.iteration < after or run.learners.group is None:
        await asyncio.sleep(0.02)
    seen = len(run.learners.group.beginnings)
    while len(run.learners.group.beginnings) == seen:
        await asyncio.sleep(0.01)


def test_a_streamed_run_has_the_numbers_of_one_that_waits_and_takes_less_time(
    waiting: list, known: dict, stub_config: Callable, execute: Callable
) -> None:
    config = stub_config(*SIX)
    run = Streaming(config, "tests", None)
    execute(run)
    assert chain(config) == waiting
    beginnings = run.learners.group.beginnings
    assert all(1 <= len(groups) < 6 for groups in beginnings)
    assert all(groups[0] % 6 == 0 and list(groups) == sorted(groups) for groups in beginnings)
    assert {groups[0] // 6 for groups in beginnings} == {0, 1, 2, 3, 4}
    for record in records(config):
        assert record["staleness/max"] == 0
        assert 0 < record["time/streamed_s"] < record["time/update_s"]
    assert sum(r["time/iteration_s"] for r in records(config)[1:]) < 0.9 * sum(known["seconds"][1:])


def test_the_next_groups_are_drawn_beside_an_evaluation(
    waiting: list, stub_config: Callable, execute: Callable
) -> None:
    under_way: list[tuple[int, int]] = []
    run = Streaming(stub_config(*SIX, "evaluation.every=2"), "tests", None)
    evaluate = run.evaluator.evaluate

    async def watched(iteration: int) -> dict[str, float]:
        under_way.append((iteration, run.batches.buffer.held().groups))
        await asyncio.sleep(0)
        under_way.append((iteration, run.batches.buffer.held().groups))
        return await evaluate(iteration)

    run.evaluator.evaluate = watched  # type: ignore[method-assign]  # It is watched, not replaced.
    execute(run)
    assert chain(run.config) == waiting
    assert [number for number, _ in under_way] == [0, 0, 2, 2, 4, 4, 5, 5]
    begun = dict(under_way)
    assert (begun[2], begun[4], begun[5]) == (6, 6, 0), "after the last iteration there are none to come"


def test_a_learner_that_dies_in_a_beginning_repeats_nothing_and_skips_nothing(
    waiting: list, stub_config: Callable, execute: Callable
) -> None:
    class Crashing(Streaming):
        early_crashes = {1, 4}  # noqa: RUF012
        crashes = {2}  # noqa: RUF012

    config = stub_config(*SIX)
    run = Crashing(config, "tests", None)
    execute(run)
    assert run.learners.group.restarts == 3
    assert chain(config) == waiting


KILLED = ("rollout-1", "learner-mailbox", "weight-store")


@pytest.mark.parametrize(
    "roles",
    [pytest.param((role,), id=role, marks=pytest.mark.slow) for role in KILLED]
    + [pytest.param(KILLED, id="one after another")],
)
def test_roles_that_are_killed_in_a_beginning_change_no_number(
    waiting: list, stub_config: Callable, execute: Callable, roles: tuple[str, ...]
) -> None:
    async def kill(run: Any) -> None:
        while run.learners.group is None:
            await asyncio.sleep(0.02)
        # In the beginning of an update a rollout actor works, and does not answer.
        processes = [await asyncio.to_thread(actor_process, role) for role in roles]
        for after, process in enumerate(processes, 1):
            await in_a_beginning(run, after)
            process.kill()

    config = stub_config(*SIX)
    execute(Streaming(config, "tests", None), kill)
    assert chain(config) == waiting


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_beginning_goes_on_where_it_was(
    waiting: list, stub_config: Callable, execute: Callable
) -> None:
    async def stop(run: Any) -> None:
        await in_a_beginning(run, after=1)
        run.interruption.request()

    config = stub_config(*SIX)
    execute(Streaming(config, "tests", None), stop)
    checkpoint = CheckpointStore(config.run_dir / "checkpoints", 2).newest()
    assert checkpoint is not None
    assert 1 <= checkpoint.state.iteration < 5
    execute(Streaming(config, "stubs", checkpoint))
    assert chain(config) == waiting

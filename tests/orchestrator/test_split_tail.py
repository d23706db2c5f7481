"""Runs whose last groups are drawn in parts by all actors have the numbers of runs that draw them whole."""

import asyncio
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig
from euphonium.role_logs import FOLDER
from orchestrator.state.checkpoints import CheckpointStore
from tests.orchestrator.test_streaming import chain, records
from tests.process import actor_process
from tests.stubs.roles import StubRun

pytestmark = pytest.mark.ray

# Two actors draw two groups, and two samples each of the third.
THREE = (
    "rollout.prompts_per_iteration=3", "rollout.group_size=4", "iterations=4", "checkpoint.every=2",
    "rewards.attempts=8",
)  # fmt: skip
SPLIT = "rollout.split_tail=true"


class Sleeping(StubRun):
    rollout_s, update_s = 1.0, 0.05


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return {}


@pytest.fixture
def whole(known: dict, stub_config: Callable, execute: Callable, tmp_path: Path) -> list[tuple[float, ...]]:
    """The chain of a run that draws whole groups."""
    if not known:
        config = stub_config(*THREE, f"output_dir={tmp_path}/whole")
        execute(Sleeping(config, "tests", None))
        known["chain"] = chain(config)
    chained: list[tuple[float, ...]] = known["chain"]
    return chained


def logged(config: RunConfig) -> RunConfig:
    """The configuration, with the folder in which its actors keep their logs."""
    (config.run_dir / FOLDER).mkdir(parents=True)
    return config


def drawn(config: RunConfig, what: str) -> list[tuple[int, str]]:
    """Which actor drew what, by the actors' logs."""
    logs = [(i, (config.run_dir / FOLDER / f"rollout-{i}.log").read_text()) for i in range(2)]
    return [(i, found) for i, log in logs for found in re.findall(rf"drew ({what}) of iteration", log)]


def test_the_last_group_is_drawn_by_both_actors(whole: list, stub_config: Callable, execute: Callable) -> None:
    config = logged(stub_config(*THREE, SPLIT))
    execute(Sleeping(config, "tests", None))
    assert chain(config) == whole
    for group in (2, 5, 8, 11):
        by_both = dict(drawn(config, f"samples [0-9]-[0-9] of group {group}"))
        assert sorted(by_both.values()) == [f"samples {part} of group {group}" for part in ("0-1", "2-3")]
        assert by_both.keys() == {0, 1}
    assert len(drawn(config, "group [0-9]+")) == 8
    for record in records(config):
        assert record["rollout/samples"] == 12


def test_an_actor_that_dies_loses_its_part_alone(
    whole: list, stub_config: Callable, execute: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    async def kill(run: Any) -> None:
        while run.position.iteration < 1:
            await asyncio.sleep(0.01)
        # It answers between two groups.
        process = await asyncio.to_thread(actor_process, "rollout-1")
        while len(run.batches.buffer.get([3, 4])) < 2:
            await asyncio.sleep(0.01)
        # Both actors are now within the third group.
        await asyncio.sleep(0.1)
        process.kill()

    config = logged(stub_config(*THREE, SPLIT))
    execute(Sleeping(config, "tests", None), kill)
    assert chain(config) == whole
    again = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(again) == 1
    assert re.match(r"samples [0-9]-[0-9] of group 5 \(", again[0])
    parts = drawn(config, "samples [0-9]-[0-9] of group 5")
    assert sorted(part for _, part in parts) == ["samples 0-1 of group 5", "samples 2-3 of group 5"]


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_with_another_size_meanwhile_repeats(
    whole: list, stub_config: Callable, execute: Callable
) -> None:
    async def stop(run: Any) -> None:
        while run.position.iteration < 1:
            await asyncio.sleep(0.02)
        run.pools.resize("rollout", 1)
        run.interruption.request()

    config = logged(stub_config(*THREE, SPLIT))
    execute(Sleeping(config, "tests", None), stop)
    checkpoint = CheckpointStore(config.run_dir / "checkpoints", 2).newest()
    assert checkpoint is not None
    assert 1 <= checkpoint.state.iteration < 4
    execute(Sleeping(config, "tests", checkpoint))
    assert chain(config) == whole
    assert {part for _, part in drawn(config, "samples [0-9]-[0-9] of group [0-9]+")} == {
        f"samples {part} of group {group}" for group, part in itertools.product((2, 5, 8, 11), ("0-1", "2-3"))
    }

"""The loop without Ray: the order of a turn, and what is on record when a turn is cut short."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from euphonium.wire.records import GroupInfo, GroupTask, UpdateReport
from orchestrator.algorithm import train
from orchestrator.groups.credit import Batch, ScoredGroup
from orchestrator.groups.staleness import Held
from orchestrator.journal import Entry, Journal
from orchestrator.learning.link import LearnerRestartedError
from orchestrator.report.tracking import read_metrics
from orchestrator.state.checkpoints import RunState
from orchestrator.state.interruption import Interruption, StopRequestedError
from orchestrator.state.position import Position, Turn

MakeConfig = Callable[..., RunConfig]


class Scripted:
    """What the loop asks of a run, in one process; ``failing`` says what goes wrong at which step, once."""

    def __init__(self, config: RunConfig, failing: dict[str, Exception] | None = None) -> None:
        config.run_dir.mkdir(parents=True)
        self.config = config
        self.failing = dict(failing or {})
        self.position = Position(RunState(iteration=0, next_group=0, world_size=1))
        self.journal = Journal(config, 0)
        self.interruption = Interruption(lambda: None)
        self.steps: list[str] = []
        self.batches = self.buffer = self.stream = self.checkpoints = self.process_reward = self

    def step(self, name: str, number: int) -> None:
        self.steps.append(f"{name} {number}")
        if error := self.failing.pop(self.steps[-1], None):
            raise error

    @property
    def finished(self) -> bool:
        return self.position.iteration == self.config.iterations

    async def interruptible(self, work: Any) -> Any:
        return await self.interruption.interruptible(work)

    async def next(self) -> Batch:
        number = self.position.iteration + 1
        self.step("draw", number)
        task = GroupTask(group_id=number, prompt="a prompt", seed=number, iteration=number - 1)
        info = GroupInfo(
            task=task, policy_version=number - 1, fingerprint="",
            rows=np.arange(3 * 4).reshape(3, 4), process_rewards=None,
            seconds={"total": 1.0, "weights": 0.0, "process_reward": 0.0}, payload_bytes=0,
        )  # fmt: skip
        scores = {name: np.array([0.0, 1.0, 2.0], np.float32) for name in ("icon", "motion", "quality")}
        reference: Any = "a reference"
        return Batch([ScoredGroup(info, reference, reference, scores, 0.1)], 0, number + 1, 0.2)

    def held(self) -> Held:
        return Held(groups=1, nbytes=0, each=0)

    def begin(self, number: int) -> Path:
        self.step("begin checkpoint", number)
        return self.config.run_dir / str(number)

    async def update(self, turn: Turn, batch: Batch, groups: Any, checkpoint: Path | None) -> UpdateReport:
        self.step("update", turn.number)
        assert (checkpoint is not None) == turn.saves
        metrics = {"time/publish_s": 0.0, "policy/ratio_deviation": 0.0, "policy/grad_norm": 0.0}
        return UpdateReport(version=turn.number, metrics=metrics)

    async def follow(self, number: int, batch: Batch, checkpoint: Path | None) -> dict[str, float]:
        self.step("follow", number)
        return {}

    async def commit(self, turn: Turn, batch: Batch, entry: Entry, checkpoint: Path | None) -> None:
        self.step("commit", turn.number)
        self.position.state = RunState(iteration=turn.number, next_group=batch.next_group, world_size=1)
        entry.numbers |= {"busy/learner": entry.busy_share(), "pool/learner": 1.0}
        entry.committed = True

    async def evaluate(self, number: int) -> dict[str, float]:
        self.step("evaluate", number)
        return {"eval/total/mean": float(number)}

    async def resize_learners(self) -> None:
        self.steps.append("resize")

    @contextlib.asynccontextmanager
    async def recovery(self) -> AsyncIterator[None]:
        try:
            yield
        except LearnerRestartedError:
            self.steps.append("rewind")
            self.position.state = RunState(iteration=0, next_group=0, world_size=1)
            self.journal.rewind(0)


def trained(config: RunConfig, **failing: Exception) -> tuple[Scripted, list[dict[str, float]], Exception | None]:
    """A run to its end or to an error: what was done, what is on record, and the error."""
    run = Scripted(config, {name.replace("_", " "): error for name, error in failing.items()})
    error: Exception | None = None

    async def scene() -> None:
        await asyncio.wait_for(train(run), 20)

    try:
        asyncio.run(scene())
    except (StopRequestedError, TrainingError) as raised:
        error = raised
    run.journal.close()
    return run, read_metrics(run.journal.tracker.path), error


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(
        "iterations=3", "evaluation.every=2", "checkpoint.every=2", "metrics.tensorboard=false",
        "metrics.prometheus_port=null",
    )  # fmt: skip


def test_a_turn_draws_updates_follows_commits_and_only_then_evaluates(config: RunConfig) -> None:
    run, records, error = trained(config)
    assert error is None
    assert run.steps == [
        "evaluate 0",
        "resize", "draw 1", "update 1", "follow 1", "commit 1",
        "resize", "draw 2", "begin checkpoint 2", "update 2", "follow 2", "commit 2", "evaluate 2",
        "resize", "draw 3", "begin checkpoint 3", "update 3", "follow 3", "commit 3", "evaluate 3",
    ]  # fmt: skip
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert [record.get("eval/total/mean") for record in records] == [0, None, 2, 3]


def test_of_an_update_that_did_not_come_about_nothing_is_on_record_and_it_is_done_again(config: RunConfig) -> None:
    run, records, error = trained(config, update_2=LearnerRestartedError("restarted"))
    assert error is None
    assert run.steps.count("rewind") == 1
    assert run.steps.count("update 1") == 2, "the checkpoint that the group went back to was that of the start"
    assert run.steps.count("evaluate 0") == 1
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]


def test_a_group_that_dies_before_the_first_evaluation_does_not_skip_it(config: RunConfig) -> None:
    run, records, error = trained(config, evaluate_0=LearnerRestartedError("restarted"))
    assert error is None
    assert run.steps[:3] == ["evaluate 0", "rewind", "evaluate 0"]
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]


def test_an_update_is_on_record_even_if_its_evaluation_is_cut_short(config: RunConfig) -> None:
    run, records, error = trained(config, evaluate_2=StopRequestedError())
    assert isinstance(error, StopRequestedError)
    assert run.position.iteration == 2
    assert records[-1]["iteration"] == 2
    assert "eval/total/mean" not in records[-1]


def test_a_stop_while_groups_are_drawn_leaves_the_turn_undone(config: RunConfig) -> None:
    run, records, error = trained(config, draw_3=StopRequestedError())
    assert isinstance(error, StopRequestedError)
    assert run.position.iteration == 2
    assert [record["iteration"] for record in records] == [0, 1, 2]


@pytest.mark.parametrize(("when", "done", "stopped"), [("commit 1", 1, True), ("commit 3", 3, False)])
def test_a_stop_is_heard_after_a_turn_but_not_after_the_last(
    config: RunConfig, when: str, done: int, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Scripted.commit

    async def commit_and_stop(self: Scripted, *arguments: Any) -> None:
        await commit(self, *arguments)
        if self.steps[-1] == when:
            self.interruption.request()

    monkeypatch.setattr(Scripted, "commit", commit_and_stop)
    run, records, error = trained(config)
    assert isinstance(error, StopRequestedError) == stopped
    assert records[-1]["iteration"] == run.position.iteration == done

"""What is on record of a run."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.errors import RewardError
from euphonium.wire.records import GroupInfo, GroupTask, UpdateReport
from orchestrator.groups.credit import Batch, ScoredGroup
from orchestrator.groups.staleness import Held
from orchestrator.journal import Entry, Journal
from orchestrator.report.tracking import read_metrics
from orchestrator.state.position import Turn

REFERENCE: Any = "a reference to arrays"


@pytest.fixture
def journal(make_config: Callable[..., RunConfig]) -> Journal:
    config = make_config("metrics.tensorboard=false", "metrics.prometheus_port=null")
    config.run_dir.mkdir(parents=True)
    return Journal(config, 0)


def turn(number: int, *, evaluates: bool = False) -> Turn:
    return Turn(number=number, last=False, evaluates=evaluates, saves=False)


def batch(*versions: int, pulled_s: float = 0.0) -> Batch:
    groups = []
    for version in versions:
        info = GroupInfo(
            task=GroupTask(group_id=0, prompt="", seed=0), policy_version=version, fingerprint="",
            rows=np.arange(3 * 1).reshape(3, 1),
            process_rewards=None, seconds={"weights": pulled_s}, payload_bytes=0,
        )  # fmt: skip
        groups.append(ScoredGroup(info, REFERENCE, REFERENCE, {"icon": np.zeros(2)}, 0.0))
    return Batch(groups, 1, 9, 4.0)


def written(journal: Journal) -> list[dict[str, float]]:
    return read_metrics(journal.tracker.path)


def test_a_batch_is_described_with_what_waits_beside_it_and_the_rewards_that_were_lost(journal: Journal) -> None:
    entry = Entry(0.0)
    journal.failures.note(RewardError("no answer", ["icon"]))
    journal.drawn(entry, turn(5), batch(4, 2), {"reward/icon/mean": 0.5}, Held(groups=3, nbytes=70, each=10))
    expected = {
        "iteration": 5, "policy_version": 5, "reward/icon/mean": 0.5, "rollout/dropped_groups": 1,
        "time/rollout_s": 4.0, "buffer/groups": 3, "buffer/bytes": 70, "staleness/mean": 1.0, "staleness/max": 2.0,
        "rewards/failures/icon": 1,
    }  # fmt: skip
    assert {key: entry.numbers[key] for key in expected} == expected
    again = Entry(0.0)
    journal.drawn(again, turn(6), batch(5), {}, Held(groups=0, nbytes=0, each=0))
    assert again.numbers["rewards/failures/icon"] == 0, "counted once"


def test_the_slowest_pull_of_weights_counts_to_their_synchronisation_and_the_busy_share_is_bounded() -> None:
    entry = Entry(began=float("-inf"))
    entry.updated(
        UpdateReport(version=1, metrics={"time/publish_s": 2.0, "time/update_s": 5.0}), batch(0, pulled_s=1.5)
    )
    assert entry.numbers["time/weight_sync_s"] == 3.5
    entry.numbers["time/iteration_s"] = 14.0
    assert entry.busy_share() == 0.5
    entry.numbers["time/iteration_s"] = 1.0
    assert entry.busy_share() == 1.0


def test_a_turn_is_written_when_it_was_committed_and_only_then(journal: Journal) -> None:
    def cut(*, committed: bool) -> None:
        with journal.turn(turn(1)) as entry:
            entry.numbers |= {"iteration": 1, "busy/learner": 0.25}
            entry.committed = committed
            raise ValueError("cut short")

    with pytest.raises(ValueError, match="cut short"):
        cut(committed=False)
    assert written(journal) == []
    with pytest.raises(ValueError, match="cut short"):
        cut(committed=True)
    (record,) = written(journal)
    assert record.items() >= {"iteration": 1, "busy/learner": 0.25}.items()
    assert abs(record["recorded_at"] - time.time()) < 60
    assert journal.learner_busy == 0.25
    assert journal.phase == "iteration 1: rollout"


def test_the_last_evaluation_is_added_to_the_record_that_lacks_it_and_rewinding_takes_out_what_is_done_again(
    journal: Journal,
) -> None:
    assert not journal.begun
    journal.start({"eval/total/mean": 0.1})
    assert journal.begun
    for number in (1, 2, 3):
        with journal.turn(turn(number)) as entry:
            entry.numbers |= {"iteration": number, "busy/learner": 0.0}
            entry.committed = True
    journal.complete_last({"eval/total/mean": 0.3})
    assert [record.get("eval/total/mean") for record in written(journal)] == [0.1, None, None, 0.3]
    journal.rewind(1)
    assert [record["iteration"] for record in written(journal)] == [0, 1]

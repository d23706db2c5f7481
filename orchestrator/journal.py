"""What is on record of a run: an object an iteration, lines for people, and what is under way.

Collects the numbers that the parts of a turn report; where they are written is orchestrator/report/tracking.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from euphonium.config import RunConfig
from euphonium.wire.records import UpdateReport
from orchestrator.groups.credit import Batch
from orchestrator.groups.staleness import Held, staleness
from orchestrator.report.advice import advice
from orchestrator.report.statistics import RewardFailures, RewardWatch
from orchestrator.report.tracking import Progress, Tracker, read_metrics
from orchestrator.state.position import Turn

WORKED = ("time/fetch_s", "time/update_s", "time/publish_s", "time/checkpoint_s")


@dataclass
class Entry:
    """Numbers of one turn, as they come in.

    Attributes:
        began: when the turn began, on the monotonic clock.
        numbers: so far.
        committed: the update is done and the position has moved: from here on the turn is on record.
    """

    began: float
    numbers: dict[str, float] = field(default_factory=dict)
    committed: bool = False

    def updated(self, report: UpdateReport, batch: Batch) -> None:
        """Takes in the learner group's report; the iteration's time ends here."""
        self.numbers |= report.metrics
        pulls = max(group.info.seconds["weights"] for group in batch.groups)
        self.numbers["time/weight_sync_s"] = report.metrics["time/publish_s"] + pulls
        self.numbers["time/iteration_s"] = time.monotonic() - self.began

    def busy_share(self) -> float:
        """Share of the iteration that the learner group worked."""
        worked = sum(self.numbers.get(part, 0.0) for part in WORKED)
        return min(1.0, worked / self.numbers["time/iteration_s"])


class Journal:
    """Keeps a run's record.

    Attributes:
        tracker: writes numbers and pictures.
        progress: the terminal.
        failures: counts the rewards that could not be had.
        phase: what is under way.
        last: line of the last iteration.
        learner_busy: share of the last iteration that the learner group worked.
    """

    def __init__(self, config: RunConfig, iterations_done: int) -> None:
        self._config = config
        self.tracker = Tracker(config, iterations_done)
        self.progress = Progress(config.iterations, iterations_done)
        self.failures = RewardFailures(config.rewards)
        records = read_metrics(self.tracker.path)
        self._watch = RewardWatch(config.rewards.watch, records)
        self.begun = iterations_done > 0
        self.phase = ""
        self.last = ""
        self.learner_busy = 0.0

    def say(self, line: str) -> None:
        """Tells people something."""
        self.progress.say(line)

    def enter(self, phase: str) -> None:
        """Notes what is under way now."""
        self.phase = phase
        self.progress.phase(phase)

    def start(self, evaluation: Mapping[str, float]) -> None:
        """Writes the evaluation before training."""
        self._write({"iteration": 0, "policy_version": 0, **evaluation})
        self.begun = True

    def drawn(self, entry: Entry, turn: Turn, batch: Batch, statistics: Mapping[str, float], held: Held) -> None:
        """Takes in what is known of a batch before it is trained."""
        lags = [staleness(turn.number - 1, group.info.policy_version) for group in batch.groups]
        entry.numbers |= {"iteration": turn.number, "policy_version": turn.number, **statistics}
        entry.numbers |= {
            "rollout/dropped_groups": batch.dropped,
            "time/rollout_s": batch.seconds,
            "buffer/groups": held.groups,
            "buffer/bytes": held.nbytes,
            "staleness/mean": float(np.mean(lags)),
            "staleness/max": float(max(lags)),
        }
        entry.numbers |= self.failures.take() | self._watch.update(turn.number, statistics, self.say)

    @contextmanager
    def turn(self, turn: Turn) -> Iterator[Entry]:
        """Collects the numbers of a turn and writes them at its end, also if its evaluation is cut short.

        Of a turn whose update was not committed nothing is on record: it will be done again.
        """
        self.enter(f"iteration {turn.number}: rollout")
        entry = Entry(time.monotonic())
        try:
            yield entry
        finally:
            if entry.committed:
                self.learner_busy = entry.numbers["busy/learner"]
                self._write(entry.numbers)
        if turn.evaluates and (line := self._advice(entry.numbers)):
            self.say(line)

    def complete_last(self, evaluation: Mapping[str, float]) -> None:
        """Adds the last evaluation of a run that was cut short in it."""
        last = read_metrics(self.tracker.path)[-1]
        self.tracker.rewind(int(last["iteration"]) - 1)
        self._write({**last, **evaluation})

    def rewind(self, iteration: int) -> None:
        """Takes out what lies beyond an iteration, which will be done again."""
        self.tracker.rewind(iteration)

    def summary(self) -> None:
        """Compares the run's first and last evaluation."""
        self.progress.summary(read_metrics(self.tracker.path))
        self.say(f"before and after: {self._config.run_dir / 'samples' / 'before_after.png'}")

    def close(self) -> None:
        """Flushes and closes everything."""
        self.progress.close()
        self.tracker.close()

    def _write(self, numbers: Mapping[str, float]) -> None:
        self.tracker.record(numbers)
        self.last = self.progress.iteration(numbers)

    def _advice(self, numbers: Mapping[str, float]) -> str | None:
        busy = {key.removeprefix("busy/"): value for key, value in numbers.items() if key.startswith("busy/")}
        sizes = {key.removeprefix("pool/"): int(value) for key, value in numbers.items() if key.startswith("pool/")}
        return advice(busy, sizes, self._config.rollout.max_staleness)

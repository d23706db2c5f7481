"""The record of a run: metrics of every iteration, lines on the terminal, and the present phase.

It collects the metrics that the parts of an iteration report; orchestrator/report/tracking.py writes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from euphonium.config import RunConfig
from euphonium.role_logs import note_iteration
from euphonium.wire.records import UpdateReport
from euphonium.wire.tracing import tracing
from orchestrator.groups.credit import Batch
from orchestrator.groups.guidance_control import GuidanceControl
from orchestrator.groups.staleness import Held, staleness
from orchestrator.report.advice import advice
from orchestrator.report.statistics import RewardFailures, RewardWatch
from orchestrator.report.tracking import Progress, Tracker, read_metrics
from orchestrator.state.position import Turn

WORKED = ("time/fetch_s", "time/update_s", "time/publish_s", "time/checkpoint_s")


@dataclass
class Entry:
    """Metrics of one turn of the run loop, as they come in.

    Attributes:
        began: start of the turn, on the monotonic clock.
        numbers: metrics so far.
        committed: whether the update is done and the run's position has moved, so that the turn counts.
    """

    began: float
    numbers: dict[str, float] = field(default_factory=dict)
    committed: bool = False

    def updated(self, report: UpdateReport, batch: Batch) -> None:
        """Adds the learner group's report; the iteration's time ends here."""
        self.numbers |= report.metrics
        pulls = max(group.info.seconds["weights"] for group in batch.groups)
        self.numbers["time/weight_sync_s"] = report.metrics["time/publish_s"] + pulls
        self.numbers["time/iteration_s"] = time.monotonic() - self.began

    def busy_share(self) -> float:
        """Share of the iteration in which the learner group worked."""
        worked = sum(self.numbers.get(part, 0.0) for part in WORKED)
        return min(1.0, worked / self.numbers["time/iteration_s"])


class Journal:
    """Keeps a run's record.

    Attributes:
        tracker: writes metrics and pictures.
        progress: prints on the terminal.
        failures: counts failed rewards.
        guidance: strength of the guidance, which follows the records.
        begun: whether the evaluation before training has been recorded.
        phase: what is under way, as a phrase.
        last: the line that was printed for the last iteration.
        learner_busy: share of the last iteration in which the learner group worked.
    """

    def __init__(self, config: RunConfig, iterations_done: int) -> None:
        self._config = config
        self.tracker = Tracker(config, iterations_done)
        self.progress = Progress(config.iterations, iterations_done)
        self.failures = RewardFailures(config.rewards)
        records = read_metrics(self.tracker.path)
        self._watch = RewardWatch(config.rewards.watch, records)
        self.guidance = GuidanceControl(config.sampler.guidance, config.rollout.max_staleness, records)
        self.begun = iterations_done > 0
        self.phase = ""
        self.last = ""
        self.learner_busy = 0.0

    def say(self, line: str) -> None:
        """Prints a line."""
        self.progress.say(line)

    def enter(self, phase: str) -> None:
        """Sets the present phase."""
        self.phase = phase
        self.progress.phase(phase)

    def start(self, evaluation: Mapping[str, float]) -> None:
        """Records the evaluation before training."""
        self._write({"iteration": 0, "policy_version": 0, **evaluation})
        self.begun = True

    def drawn(self, entry: Entry, turn: Turn, batch: Batch, statistics: Mapping[str, float], held: Held) -> None:
        """Adds what is known of a batch before it is trained on."""
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
        entry.numbers |= self.guidance.observe(turn.number, statistics)

    @contextmanager
    def turn(self, turn: Turn) -> Iterator[Entry]:
        """Collects the metrics of a turn and writes them at its end, also if its evaluation is cut short.

        Nothing is written of a turn whose update was not committed: it will be done again.
        """
        self.enter(f"iteration {turn.number}: rollout")
        note_iteration(self._config.run_dir, turn.number)
        entry = Entry(time.monotonic())
        try:
            with tracing(self._config, turn.number):
                yield entry
        finally:
            if entry.committed:
                self.learner_busy = entry.numbers["busy/learner"]
                self._write(entry.numbers)
        if turn.evaluates and (line := self._advice(entry.numbers)):
            self.say(line)

    def complete_last(self, evaluation: Mapping[str, float]) -> None:
        """Adds the final evaluation to the last record, for a run that was interrupted in it."""
        last = read_metrics(self.tracker.path)[-1]
        self.tracker.rewind(int(last["iteration"]) - 1)
        self._write({**last, **evaluation})

    def rewind(self, iteration: int) -> None:
        """Removes the records after an iteration, which will be done again."""
        self.tracker.rewind(iteration)

    def summary(self) -> None:
        """Prints a comparison of the run's first and last evaluation."""
        self.progress.summary(read_metrics(self.tracker.path))
        self.say(f"before and after: {self._config.run_dir / 'samples' / 'before_after.png'}")

    def close(self) -> None:
        """Flushes and closes everything."""
        self.progress.close()
        self.tracker.close()

    def _write(self, numbers: Mapping[str, float]) -> None:
        self.tracker.record({**numbers, "recorded_at": time.time()})
        self.last = self.progress.iteration(numbers)

    def _advice(self, numbers: Mapping[str, float]) -> str | None:
        busy = {key.removeprefix("busy/"): value for key, value in numbers.items() if key.startswith("busy/")}
        sizes = {key.removeprefix("pool/"): int(value) for key, value in numbers.items() if key.startswith("pool/")}
        return advice(busy, sizes, self._config.rollout.max_staleness)

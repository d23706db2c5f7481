"""Writes the metrics of a run to ``metrics.jsonl``, trackers, Prometheus and the terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from euphonium.config import RunConfig
from euphonium.errors import PreflightError
from euphonium.role_logs import SAID
from orchestrator.report.discovery import announce
from orchestrator.report.metrics import PrometheusEndpoint, find_metric
from orchestrator.report.trackers import SavedClip, open_trackers

log = logging.getLogger(__name__)
said = logging.getLogger(SAID)

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Writes the metrics of each iteration to all places except the terminal.

    Records after ``iterations_done``, which a resumed run does again, are removed first.
    """

    def __init__(self, config: RunConfig, iterations_done: int) -> None:
        self.path = config.run_dir / METRICS_FILE
        _drop_after(self.path, iterations_done)
        self._stream = self.path.open("a", encoding="utf-8")
        self._trackers = open_trackers(config, iterations_done)
        self.endpoint = None
        if config.metrics.prometheus_port is not None:
            rewards = [reward.name for reward in config.rewards.outcome]
            self.endpoint = _endpoint(config, config.metrics.prometheus_port, rewards)
            announce(config, self.endpoint.address)

    def record(self, values: Mapping[str, float]) -> None:
        """Writes the metrics of an iteration; every key must be declared in ``orchestrator/report/metrics.py``."""
        for key in values:
            find_metric(key)
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()
        for tracker in self._trackers:
            tracker.scalars(values, int(values["iteration"]))
        if self.endpoint is not None:
            self.endpoint.set(values)

    def rewind(self, iteration: int) -> None:
        """Removes the records after an iteration, which will be done again."""
        self._stream.close()
        _drop_after(self.path, iteration)
        self._stream = self.path.open("a", encoding="utf-8")

    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        """Sends an image (uint8 ``[height, width, 3]``) to all trackers."""
        for tracker in self._trackers:
            tracker.picture(name, pixels, iteration)

    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        """Sends the clips of an evaluation to all trackers."""
        for tracker in self._trackers:
            tracker.clips(saved, iteration)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._stream.close()
        for tracker in self._trackers:
            tracker.close()
        if self.endpoint is not None:
            self.endpoint.close()


def _endpoint(config: RunConfig, port: int, rewards: list[str]) -> PrometheusEndpoint:
    try:
        return PrometheusEndpoint(config.name, port, config.metrics.prometheus_host, rewards)
    except OSError as error:
        raise PreflightError(
            f"metrics.prometheus_port: cannot serve metrics at {config.metrics.prometheus_host}:{port} "
            f"({error.strerror}); "
            "take 0 for any free port, null for no metrics there, or another metrics.prometheus_host"
        ) from error


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads the records of a ``metrics.jsonl``; a truncated last line, left by a kill, is skipped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(dict(json.loads(line)))
        except json.JSONDecodeError:
            log.warning("%s: leaving out a torn line", path)
    return records


def _drop_after(path: Path, iterations_done: int) -> None:
    """Removes the records after the checkpoint that a run resumes from."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["iteration"] <= iterations_done]
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    aside.replace(path)


class Progress:
    """Prints a line for each iteration, and shows a progress bar if the output is a terminal."""

    def __init__(self, iterations: int, done: int) -> None:
        self._total = iterations
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=iterations, completed=done)
            self._bar.start()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one; it goes to the driver's log, too."""
        said.info(text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def phase(self, text: str) -> None:
        """Shows the present phase beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def iteration(self, record: Mapping[str, float]) -> str:
        """Prints the line of an iteration, and returns it."""
        done = int(record["iteration"])
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        width = len(str(self._total))
        parts = [f"iteration {done:>{width}}/{self._total}"]
        if "time/iteration_s" in record:
            parts.append(f"{record['time/iteration_s']:5.1f} s")
        rewards = [k for k in record if k.startswith("reward/") and k.endswith("/mean")]
        if rewards:
            parts.append("reward " + "  ".join(f"{k.split('/')[1]} {record[k]:.3f}" for k in rewards))
            if "policy/ratio_deviation" in record:
                parts.append(f"ratio-1 {record['policy/ratio_deviation']:.0e}")
            parts.append(f"grad {record['policy/grad_norm']:.2g}")
        if "eval/total/mean" in record:
            parts.append(f"held-out {record['eval/total/mean']:.4f}")
        line = " | ".join(parts)
        self.say(line)
        return line

    def summary(self, records: Sequence[Mapping[str, float]]) -> None:
        """Prints a comparison of the first and the last evaluation of a run."""
        evaluations = [record for record in records if any(key.startswith("eval/") for key in record)]
        if len(evaluations) < 2:
            return
        first, last = evaluations[0], evaluations[-1]
        self.say(f"held-out rewards, iteration {first['iteration']} -> {last['iteration']}:")
        for key in first:
            # A reward that failed in one of the two has no mean there.
            if key.startswith("eval/") and key.endswith("/mean") and key in last:
                name = key.split("/")[1]
                self.say(f"  {name:<12} {first[key]:.4f} -> {last[key]:.4f}  ({last[key] - first[key]:+.4f})")

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()

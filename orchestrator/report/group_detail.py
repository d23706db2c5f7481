"""One group in detail, as ``euphonium debug group`` left it in a run's folder, for the run's report."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from orchestrator.report.figures import Chart, Series
from orchestrator.report.recorded import RecordedRun

FOLDER, TABLE, PICTURE = "debug", "group.csv", "group.png"

Row = Mapping[str, float]
_CHARTS: tuple[tuple[str, str, bool, Callable[[Row], float]], ...] = (
    ("Gradient norm of every step", "Of the mean loss over the step's transitions, without KL penalty.", True,
     lambda row: row["step_grad_norm"]),
    ("|ratio - 1| of every step", "The learner's probability against the rollout's.", True,
     lambda row: abs(row["ratio"] - 1)),
    ("|advantage| of every step", "Mean over the group.", False, lambda row: abs(row["advantage"])),
    ("Process reward of every step", "Mean over the group.", False, lambda row: row["process_reward"]),
)  # fmt: skip


def group_charts(run: RecordedRun) -> list[Chart]:
    """Charts over the steps of the group; none where no group was looked at."""
    file = _file(run, TABLE)
    if file is None:
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    steps = sorted({row["step"] for row in rows})
    charts = []
    for title, meaning, log, value in _CHARTS:
        y = [fmean(value(row) for row in rows if row["step"] == step) for step in steps]
        if any(y):
            charts.append(Chart(title, [Series("group", steps, y)], meaning, log, x_label="step"))
    return charts


def group_picture(run: RecordedRun, most_bytes: int) -> str:
    """The picture of its states as a data URI; empty where there is none, or it is too large."""
    file = _file(run, PICTURE)
    if file is None or file.stat().st_size * 4 / 3 > most_bytes:
        return ""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _file(run: RecordedRun, name: str) -> Path | None:
    file = run.folder / FOLDER / name if run.folder is not None else None
    return file if file is not None and file.is_file() else None

"""What a run has recorded in its folder, read without Ray, and while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from euphonium.config.yaml_files import parse_yaml
from euphonium.errors import ConfigError
from euphonium.text_files import read_text, shown
from orchestrator.report.settings import flattened
from orchestrator.report.tracking import METRICS_FILE, read_metrics
from orchestrator.state.checkpoints import RESOLVED

SAMPLES = "samples"

Record = Mapping[str, float]


@dataclass(frozen=True)
class RecordedRun:
    """A run as its folder tells of it.

    Attributes:
        name: what it is called beside other runs.
        folder: its folder; None if only its metrics are known.
        records: metrics of every iteration, ascending; those of iteration 0 are the evaluation before training.
        recipe: the resolved recipe as plain values; empty if it is not there.
    """

    name: str
    folder: Path | None
    records: Sequence[Record]
    recipe: Mapping[str, object]

    @cached_property
    def settings(self) -> dict[str, object]:
        """The recipe's values by path, such as ``sampler.eta``; lists of values stay whole."""
        return flattened(self.recipe)

    @cached_property
    def keys(self) -> list[str]:
        """Keys of all metrics, in the order in which they appeared."""
        return list(dict.fromkeys(key for record in self.records for key in record))

    @property
    def done(self) -> int:
        """Number of iterations on record."""
        return int(self.records[-1]["iteration"]) if self.records else 0

    @property
    def planned(self) -> int | None:
        """Number of iterations of the whole run; None if the recipe is not there."""
        value = self.settings.get("iterations")
        return value if isinstance(value, int) else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Iterations that recorded a metric, and its values there; values that are not finite are left out."""
        known = [(r["iteration"], r[key]) for r in self.records if key in r and math.isfinite(r[key])]
        return [x for x, _ in known], [y for _, y in known]

    def recent(self, key: str, count: int = 10) -> float | None:
        """Mean of a metric over the last iterations that recorded it; None if none did."""
        values = self.series(key)[1][-count:]
        return sum(values) / len(values) if values else None


def read_run(path: Path) -> RecordedRun:
    """Reads a run's folder, or a ``metrics.jsonl`` alone.

    Raises:
        ConfigError: it holds no metrics.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"{shown(path)} holds no {METRICS_FILE}" if path.is_dir() else f"there is no {shown(path)}"
        raise ConfigError(f"{what}; give the folder of a run, such as runs/demo, or its {METRICS_FILE}")
    try:
        found = {int(record["iteration"]): record for record in read_metrics(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{shown(file)} is not the record of a run: a line has no iteration; give another") from error
    records = [found[iteration] for iteration in sorted(found)]
    recipe = file.parent / RESOLVED
    if file.name != METRICS_FILE or not recipe.is_file():
        return RecordedRun(file.stem if file.name != METRICS_FILE else file.parent.name, None, records, {})
    values, _ = parse_yaml(read_text(recipe, ""), str(recipe), lines=False)
    return RecordedRun(file.parent.resolve().name, file.parent, records, values if isinstance(values, dict) else {})


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """Reads several runs; those of one name are told apart by their parent folders, or by numbers.

    Raises:
        ConfigError: one of them holds no metrics.
    """
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [
            f"{run.folder.resolve().parent.name}/{run.name}" if run.folder and names.count(run.name) > 1 else run.name
            for run in runs
        ]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def differences(runs: Sequence[RecordedRun]) -> dict[str, list[object]]:
    """Settings in which runs differ, by path: one value a run, ``ABSENT`` where a run's recipe has no such field."""
    known = [run for run in runs if run.recipe]
    paths = dict.fromkeys(path for run in known for path in run.settings)
    rows = {path: [run.settings.get(path, ABSENT) for run in known] for path in paths}
    # An empty mapping beside a filled one is told by what the filled one holds.
    filled = {path.rpartition(".")[0] for path in paths}
    return {path: row for path, row in rows.items() if any(value != row[0] for value in row[1:]) and path not in filled}


class _Absent:
    def __repr__(self) -> str:
        return "(not in the recipe)"


ABSENT = _Absent()

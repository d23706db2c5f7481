"""What a study's runs say: values by iteration, speed against a reference with bootstrap intervals, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.runs import Record

Floats = NDArray[np.float64]
RESAMPLES = 10_000
COLOURS = ("#0b63c5", "#d1570b", "#1f8a4c", "#8d3fb0", "#c9a400", "#c02942", "#2a9d9d", "#707070")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 420, 60, 20, 40


@dataclass(frozen=True)
class Row:
    """All runs of a method.

    Attributes:
        name: the method's.
        seeds: of its runs.
        iterations: where it was evaluated.
        values: ``[seeds, iterations]``.
    """

    name: str
    seeds: tuple[int, ...]
    iterations: tuple[int, ...]
    values: Floats


def rows(records: Sequence[Record], metric: str = "eval/total/mean") -> list[Row]:
    """One row a method, in the records' order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.trial.method.name, []).append(record)
    result = []
    for name, runs in found.items():
        curves = [run.curve(metric) for run in runs]
        iterations = tuple(sorted(set.intersection(*[set(curve) for curve in curves])))
        values = np.array([[curve[i] for i in iterations] for curve in curves])
        result.append(Row(name, tuple(run.trial.seed for run in runs), iterations, values))
    return result


def iterations_to(target: float, iterations: Sequence[int], values: Floats) -> float:
    """Where a curve first reaches a value, between its evaluations by straight lines; infinite if it never does.

    >>> iterations_to(0.5, [0, 4, 8], np.array([0.0, 0.4, 0.8]))
    5.0
    >>> iterations_to(0.9, [0, 4, 8], np.array([0.0, 0.4, 0.8]))
    inf
    """
    for i, value in enumerate(values):
        if value >= target:
            if i == 0:
                return float(iterations[0])
            share = (target - values[i - 1]) / (value - values[i - 1])
            return float(iterations[i - 1] + share * (iterations[i] - iterations[i - 1]))
    return float("inf")


@dataclass(frozen=True)
class Speed:
    """How much sooner a method reaches the best value of a reference.

    Attributes:
        ratio: iterations of the reference over those of the method, means over the seeds.
        low: lower end of the 95 % bootstrap interval over the seeds.
        high: its upper end.
        reached: share of the seeds in which it is reached at all.
    """

    ratio: float
    low: float
    high: float
    reached: float


def speed(row: Row, reference: Row, seed: int = 0) -> Speed:
    """Iterations to the reference's best value, seed by seed, against the iterations that the reference took itself.

    A seed in which the method never gets there counts with a ratio of 0.
    """
    targets = reference.values.max(axis=1)
    took = np.array([iterations_to(t, reference.iterations, v) for t, v in zip(targets, reference.values, strict=True)])
    takes = np.array([iterations_to(t, row.iterations, v) for t, v in zip(targets, row.values, strict=True)])
    drawn = np.random.default_rng(seed).integers(len(took), size=(RESAMPLES, len(took)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = took[drawn].mean(axis=1) / takes[drawn].mean(axis=1)
        ratio = float(took.mean() / takes.mean())
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Speed(ratio, float(low), float(high), float(np.isfinite(takes).mean()))


def markdown(found: Sequence[Row], reference: str) -> str:
    """The table: mean and standard error by iteration, and speed against the reference where it has the same seeds."""
    base = next(row for row in found if row.name == reference)
    shown = [i for i in base.iterations if i]
    lines = [
        f"| method | seeds | {' | '.join(str(i) for i in shown)} | last / best | iterations to its best, ratio |",
        "|---" * (len(shown) + 4) + "|",
    ]
    for row in found:
        cells = []
        for i in shown:
            if i not in row.iterations:
                cells.append("")
                continue
            values = row.values[:, row.iterations.index(i)]
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
            cells.append(f"{values.mean():.3f} ± {error:.3f}")
        mean = row.values.mean(axis=0)
        start = mean[0]
        kept = (mean[-1] - start) / (mean.max() - start) if mean.max() > start else float("nan")
        faster = speed(row, base) if row.seeds == base.seeds else None
        ratio = ""
        if faster is not None and faster.reached < 1:
            ratio = f"reached in {faster.reached * len(row.seeds):.0f} seeds of {len(row.seeds)}"
        elif faster is not None:
            ratio = f"{faster.ratio:.2f} [{faster.low:.2f}, {faster.high:.2f}]"
        lines.append(f"| {row.name} | {len(row.seeds)} | {' | '.join(cells)} | {kept:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


def as_json(found: Sequence[Row]) -> list[dict[str, object]]:
    """All values."""
    return [
        {"method": r.name, "seeds": r.seeds, "iterations": r.iterations, "values": r.values.round(5).tolist()}
        for r in found
    ]


def plot(found: Sequence[Row], title: str) -> str:
    """Curves of the means with bands of one standard error, as SVG."""
    last = max(row.iterations[-1] for row in found)
    low = min(float(row.values.min()) for row in found)
    high = max(float(row.values.max()) for row in found)
    room = (high - low) or 1.0

    def at(iteration: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 200) * iteration / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / room
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{title}"><rect width="100%" height="100%" fill="white"/>'
    ]
    for share in np.linspace(0, 1, 6):
        value = low + share * room
        x, y = at(0, value).split(",")
        end = at(last, value).split(",")[0]
        parts.append(f'<path d="M{x},{y}H{end}" stroke="#ddd"/><text x="8" y="{float(y) + 4:.1f}">{value:.2f}</text>')
    for iteration in found[0].iterations:
        x, y = at(iteration, low).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle">{iteration}</text>')
    parts.append(f'<text x="{LEFT}" y="14">{title}</text>')
    for number, row in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        mean = row.values.mean(axis=0)
        error = row.values.std(axis=0, ddof=1) / np.sqrt(len(row.seeds)) if len(row.seeds) > 1 else 0 * mean
        upper = [at(i, m + e) for i, m, e in zip(row.iterations, mean, error, strict=True)]
        lower = [at(i, m - e) for i, m, e in zip(row.iterations, mean, error, strict=True)]
        line = " ".join(at(i, m) for i, m in zip(row.iterations, mean, strict=True))
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + 16 + 20 * number
        parts.append(f'<path d="M{WIDTH - 190},{y - 4}h20" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - 165}" y="{y}">{row.name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"

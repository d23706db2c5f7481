"""A run on one screen of a terminal, from what its folder has on record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.report.figures import number, thinned
from orchestrator.report.findings import findings
from orchestrator.report.recorded import RecordedRun

BLOCKS = "▁▂▃▄▅▆▇█"
BAR = 20
ROLES = ("rollout", "prm", "orm", "learner")
CURVE = 40
STYLES = {"good": "green", "note": "dim", "warning": "yellow"}
DIAGNOSTICS = (
    "policy/grad_norm", "policy/clip_fraction", "policy/ratio_deviation", "policy/approx_kl", "kl/anchor",
    "guidance/gain", "guidance/strength", "process/pairwise_accuracy", "advantage/zero_std_groups",
    "rollout/dropped_groups", "staleness/max", "time/iteration_s", "time/rollout_s", "time/update_s",
)  # fmt: skip


def sparkline(values: Sequence[float], width: int = CURVE) -> str:
    """A curve of block characters.

    Example:
        >>> sparkline([0.0, 0.5, 1.0])
        '▁▅█'
    """
    chosen = [values[i] for i in thinned(len(values), width)]
    low, high = min(chosen), max(chosen)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((value - low) / span * len(BLOCKS)))] for value in chosen)


def screen(run: RecordedRun, log_lines: Sequence[str] = ()) -> RenderableType:
    """The screen.

    Args:
        run: what is on record.
        log_lines: the latest lines of the driver's log, shown below.
    """
    parts: list[RenderableType] = [_head(run), _rewards(run), _diagnostics(run), _pools(run)]
    parts += [Text(f"{one.kind}: {one.text}", style=STYLES[one.kind]) for one in findings(run)]
    parts += [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in log_lines]
    return Group(*parts)


def remaining_s(run: RecordedRun) -> float | None:
    """Seconds until the end, if further iterations take as long as the last ones; None if it cannot be told."""
    seconds = run.recent("time/iteration_s")
    if seconds is None or run.planned is None:
        return None
    left = run.planned - run.done
    evaluation, every = run.recent("time/evaluation_s"), run.settings.get("evaluation.every")
    return left * (seconds + (evaluation / every if evaluation and isinstance(every, int) else 0.0))


def _head(run: RecordedRun) -> Text:
    planned = f" of {run.planned}" if run.planned is not None else ""
    text = Text(f"{run.name}: iteration {run.done}{planned}", style="bold")
    left = remaining_s(run)
    if left:
        text.append(f", about {left / 60:.0f} min left" if left >= 60 else f", about {left:.0f} s left")
    return text


def _rewards(run: RecordedRun) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("reward", "left"), ("first", "right"), ("last", "right"), ("change", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # literals, which the loop widens to str
    table.add_column("held out")
    table.add_column("drawn", justify="right")
    for key in run.keys:
        if not (key.startswith("eval/") and key.endswith("/mean")):
            continue
        values, name = run.series(key)[1], key.split("/")[1]
        if not values:
            continue
        change, drawn = values[-1] - values[0], run.series(f"reward/{name}/mean")[1]
        style = "green" if change > 0 else "red" if change < 0 else ""
        table.add_row(
            name, f"{values[0]:.4f}", f"{values[-1]:.4f}", Text(f"{change:+.4f}", style=style), sparkline(values),
            f"{drawn[-1]:.4f}" if drawn else "",
        )  # fmt: skip
    return table


def _diagnostics(run: RecordedRun) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("metric")
    table.add_column("last", justify="right")
    table.add_column("so far")
    for key in DIAGNOSTICS:
        values = run.series(key)[1]
        if values:
            table.add_row(key, number(values[-1]), sparkline(values))
    return table


def _pools(run: RecordedRun) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("pool")
    table.add_column("members", justify="right")
    table.add_column("busy")
    for role in ROLES:
        size, busy = run.recent(f"pool/{role}", 1), run.recent(f"busy/{role}", 1)
        if size is not None and busy is not None:
            filled = round(max(0.0, min(1.0, busy)) * BAR)
            table.add_row(role, f"{size:.0f}", f"{'█' * filled}{'·' * (BAR - filled)} {busy:.0%}")
    return table


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a log; none if it is not there."""
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 400 * count))
        return stream.read().decode("utf-8", "replace").splitlines()[-count:]

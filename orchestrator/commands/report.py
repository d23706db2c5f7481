"""``euphonium report`` and ``euphonium watch``: looking at runs through their folders, without Ray."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.arguments import file_argument

REPORT = "report.html"
Run = Annotated[
    Path, typer.Argument(parser=file_argument, metavar="RUN", help="Folder of a run, or its metrics.jsonl alone.")
]


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(parser=file_argument, metavar="RUN...", help="Folders of runs, or their metrics.jsonl alone."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=file_argument,
            metavar="FILE",
            help="Default: report.html in the first run's folder.",
        ),
    ] = None,
    clips_mb: Annotated[
        float, typer.Option(min=0, max=1000, help="Megabytes that all clips may take in the page.")
    ] = 20.0,
) -> None:
    """Write one HTML page on one run, or on several beside each other; it opens offline.

    Held-out rewards, clips before and after, what stands out, updates, ratios, guidance, pools, and the settings in
    which the runs differ. A run that goes on may be reported, too.
    """
    from orchestrator.commands.cli import say

    say(str(write_report(runs, output, clips_mb)))


def watch(
    run: Run,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> None:
    """Show a run in the terminal while it goes on, from its folder; ends with the run, or with Ctrl-C.

    Needs no connection to the cluster, only the folder. Without a terminal it is shown once.
    """
    from rich.console import Console
    from rich.live import Live

    from orchestrator.report.live import last_lines, screen
    from orchestrator.report.recorded import read_run

    console = Console()
    log_file = (run if run.is_dir() else run.parent) / "logs" / "driver.log"
    recorded = read_run(run)
    if once or not console.is_terminal:
        console.print(screen(recorded, last_lines(log_file, 5)))
        return
    try:
        with Live(screen(recorded, last_lines(log_file, 5)), console=console, auto_refresh=False) as live:
            while recorded.planned is None or recorded.done < recorded.planned:
                time.sleep(every)
                recorded = read_run(run)
                live.update(screen(recorded, last_lines(log_file, 5)), refresh=True)
    except KeyboardInterrupt:
        return


def write_report(folders: Sequence[Path], output: Path | None, clips_mb: float) -> Path:
    """Writes a report of runs.

    Args:
        folders: folders of the runs, or their ``metrics.jsonl`` alone.
        output: the file; None for ``report.html`` beside the metrics of the first run.
        clips_mb: megabytes that all clips may take in it.

    Returns:
        The file.

    Raises:
        ConfigError: a folder holds no run.
    """
    from importlib.metadata import version

    from euphonium.files import written_aside
    from orchestrator.report.page import report_page
    from orchestrator.report.recorded import read_runs

    runs = read_runs(folders)
    target = output or (folders[0] if folders[0].is_dir() else folders[0].parent) / REPORT
    made = f"Made {datetime.datetime.now():%Y-%m-%d %H:%M} by euphonium {version('euphonium')} from what is on record."
    page = report_page(runs, made, int(clips_mb * 1e6))
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(target) as file:
        file.write_text(page, encoding="utf-8")
    return target

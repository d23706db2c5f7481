"""``euphonium label`` and ``preferences``: from drawn clips to what reward models are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.arguments import file_argument


def label(
    folder: Annotated[
        Path,
        typer.Argument(parser=file_argument, metavar="FOLDER", help="Clips that generate drew, several a prompt."),
    ],
) -> None:
    """Write a sheet in which people label the clips of a folder: labels.csv, a row a clip.

    1 is good and 0 is bad, or any numbers, the higher the better. Labels that are in it already stay.
    """
    from orchestrator.commands.cli import say
    from orchestrator.comparison.labels import write_sheet

    sheet, rows, labelled = write_sheet(folder)
    say(f"{sheet}: {labelled} of {rows} clips are labelled")
    say(f"fill the last column in, then: euphonium preferences {folder}")


def preferences(
    folder: Annotated[
        Path,
        typer.Argument(parser=file_argument, metavar="FOLDER", help="Labelled clips, or a comparison that was judged."),
    ],
    results: Annotated[
        list[Path] | None,
        typer.Argument(parser=file_argument, metavar="[RESULTS]...", help="Of a comparison: the files of its judges."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=file_argument, metavar="FILE", help="New preference file, .jsonl.")
    ] = Path("preferences.jsonl"),
) -> None:
    """Turn people's labels, or their judgements of pairs, into a preference file for train-prm and train-orm."""
    from orchestrator.commands.cli import say
    from orchestrator.comparison.judgements import read_comparison, read_judgements
    from orchestrator.comparison.labels import judged_preferences, labelled_preferences, write_preferences
    from orchestrator.comparison.models import RESULT

    if (folder / RESULT).is_file():
        comparison = read_comparison(folder)
        lines = judged_preferences(folder, comparison, read_judgements(results or [], comparison))
    else:
        lines = labelled_preferences(folder)
    write_preferences(output, lines)
    say(f"{output}: {len(lines)} lines of {len({line['prompt'] for line in lines})} prompts")

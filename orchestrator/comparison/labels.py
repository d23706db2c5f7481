"""People's labels of drawn clips: a sheet to fill in beside them, and the preferences that it becomes.

The sheet is a table with a row a clip, ``labels.csv``, for any spreadsheet program. A label is 1 or 0 (good or bad), or
any number, the higher the better; a clip without one is left out.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from euphonium.errors import ConfigError
from euphonium.files import written_aside
from euphonium.prompt_files import read_prompt_file
from euphonium.text_files import quoted, read_text
from learners.rewards.video_files import PILLOW, PYAV
from orchestrator.comparison.judgements import Judgement
from orchestrator.generation.draw import PROMPTS, read_index

SHEET = "labels.csv"
COLUMNS = ("file", "prompt", "seed", "label")
FIELD = "FOLDER"


def write_sheet(folder: Path) -> tuple[Path, int, int]:
    """Writes ``labels.csv`` for the clips of a folder; labels that are in it already stay.

    Returns:
        The sheet, its number of rows, and how many of them have a label.

    Raises:
        ConfigError: the folder holds no clips of ``generate``, or ones that preferences cannot be of.
    """
    _, samples = read_index(folder)
    for sample in samples:
        file = folder / str(sample["file"])
        if not file.is_file() or file.suffix not in PILLOW | PYAV:
            raise ConfigError(
                f"{FIELD}: {file} is no file of a clip; draw with --format mp4 or gif, and wait until all are drawn"
            )
    known = read_sheet(folder) if (folder / SHEET).is_file() else {}
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for sample in samples:
        table.writerow([sample["file"], sample["prompt"], sample["seed"], known.get(str(sample["file"]), "")])
    with written_aside(folder / SHEET) as file:
        # Spreadsheet programs take a table without the mark for one in their country's old encoding.
        file.write_text(text.getvalue(), encoding="utf-8-sig")
    files = {str(sample["file"]) for sample in samples}
    return folder / SHEET, len(samples), len(files & known.keys())


def read_sheet(folder: Path) -> dict[str, str]:
    """The labels of a folder's sheet as they were written, by file; clips without one are missing.

    Raises:
        ConfigError: the sheet cannot be read, or names a clip that the folder does not have.
    """
    path = folder / SHEET
    lines = read_text(path, FIELD).splitlines()
    # What programs write where the comma is the decimal sign.
    separator = ";" if lines and lines[0].count(";") > lines[0].count(",") else ","
    table = csv.DictReader(lines, delimiter=separator)
    if not {"file", "label"} <= set(table.fieldnames or ()):
        raise ConfigError(f"{FIELD}: {path} has no columns file and label in its first line; make it anew with `label`")
    files = {str(sample["file"]) for sample in read_index(folder)[1]}
    found: dict[str, str] = {}
    for row in table:
        file, label = (row["file"] or "").strip(), (row["label"] or "").strip()
        if file not in files:
            raise ConfigError(f"{FIELD}: line {table.line_num} of {path} is of {quoted(file)}, which is not drawn here")
        if label:
            found[file] = label
    return found


def labelled_preferences(folder: Path) -> list[dict[str, Any]]:
    """The lines of a preference file that a sheet becomes, with absolute paths.

    Labels 0 and 1 stay labels of single clips; of other numbers each two clips of a prompt make a pair, or a tie.

    Raises:
        ConfigError: there is no sheet, no label in it, or a label that is no number.
    """
    labels = {file: _number(label, file) for file, label in read_sheet(folder).items()}
    if not labels:
        raise ConfigError(f"{FIELD}: {folder / SHEET} has no label yet; fill its last column in")
    images = _images(folder)
    by_prompt: dict[str, list[tuple[str, float]]] = {}
    for sample in read_index(folder)[1]:
        if sample["file"] in labels:
            clips = by_prompt.setdefault(str(sample["prompt"]), [])
            clips.append((str((folder / sample["file"]).absolute()), labels[sample["file"]]))
    binary = set(labels.values()) <= {0.0, 1.0}
    return [
        {"prompt": prompt, **images.get(prompt, {}), **entry}
        for prompt, clips in by_prompt.items()
        for entry in (_singles(clips) if binary else _pairs(clips))
    ]


def _singles(clips: Sequence[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    for file, label in clips:
        yield {"sample": file, "label": int(label)}


def _pairs(clips: Sequence[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    for one, other in itertools.combinations(clips, 2):
        better, worse = (one, other) if one[1] >= other[1] else (other, one)
        yield {"winner": better[0], "loser": worse[0], **({"tie": True} if one[1] == other[1] else {})}


def _number(label: str, file: str) -> float:
    try:
        value = float(label.replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{FIELD}: the label of {file} is {quoted(label)}; give 1 or 0, or another number")
    return value


def _images(folder: Path) -> dict[str, dict[str, str]]:
    """First frames of the prompts, as entries of preference lines."""
    if not (folder / PROMPTS).is_file():
        return {}
    entries = read_prompt_file(folder / PROMPTS, FIELD)
    return {entry.text: {"image": str(entry.image)} for entry in entries if entry.image is not None}


def judged_preferences(
    folder: Path, comparison: Mapping[str, Any], judgements: Sequence[Judgement]
) -> list[dict[str, Any]]:
    """The lines of a preference file that the judgements of a comparison become, with absolute paths."""
    found = []
    for one in judgements:
        pair = comparison["pairs"][one.pair]
        better, worse = ("a", "b") if one.choice != "b" else ("b", "a")
        found.append(
            {
                "prompt": pair["prompt"],
                "winner": str((folder / pair[better]).absolute()),
                "loser": str((folder / pair[worse]).absolute()),
                **({"tie": True} if one.choice == "tie" else {}),
            }
        )
    return found


def write_preferences(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a preference file, which must not exist.

    Raises:
        ConfigError: it exists, or its name has another ending.
    """
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"--output: {path} has to end in .jsonl, as preference files do")
    if path.exists():
        raise ConfigError(f"--output: {path} exists; choose another name, nothing is written over")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as file:
        file.write_text("".join(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

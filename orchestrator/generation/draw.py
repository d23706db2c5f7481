"""Draws the clips of a plan, here or in Ray tasks, and keeps an index of them.

Clips that are there are left alone, so that the same command goes on where it was killed. What the clips of a folder
are and how they were drawn is in its ``index.json``; other settings want another folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from euphonium.errors import ConfigError, PreflightError
from euphonium.files import written_aside
from euphonium.text_files import parse_json, quoted, read_text
from euphonium.wire.devices import reserved_device
from orchestrator.generation.clips import ClipFormat, read_clip, save_with_sound
from orchestrator.generation.models import Model, ModelSource
from orchestrator.generation.samples import Layout, Plan, Sample
from orchestrator.generation.tasks import Progress, in_tasks
from orchestrator.report.pictures import contact_sheet

INDEX = "index.json"
PROMPTS = "prompts.jsonl"
SHEET = "contact_sheet.png"
FIELD = "--output"
# Rows and columns of the contact sheet.
MOST_ROWS, MOST_COLUMNS = 32, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Clips that are to be drawn, and how.

    Attributes:
        source: the model.
        form: how clips are written.
        layout: how they are named.
        folder: where they are written.
        batch: clips of a pass.
        threads: CPU threads of each process; None leaves them as they are.
        gpus: GPUs of each Ray task.
    """

    source: ModelSource
    form: ClipFormat
    layout: Layout
    folder: Path
    batch: int = 1
    threads: int | None = None
    gpus: float = 0.0


def draw_clips(job: Job, plan: Plan, workers: int, say: Callable[[str], None]) -> list[Path]:
    """Draws what is left of a plan.

    Args:
        job: what draws, and how.
        plan: the clips.
        workers: number of Ray tasks; 0 draws in this process.
        say: prints a line.

    Returns:
        The files of all clips, and of the contact sheet if there is one.

    Raises:
        ConfigError: the model cannot draw them so, or the folder holds clips that were drawn otherwise.
        EuphoniumError: a clip could not be drawn.
    """
    job.form.check()
    job.source.check(plan.samples)
    settings = _settings(job)
    _refuse_others(job.folder, settings, plan.samples)
    job.folder.mkdir(parents=True, exist_ok=True)
    _write_beside(job.folder, plan)
    _write_index(job.folder, settings, plan.samples)
    left = [sample for sample in plan.samples if not (job.folder / sample.file).exists()]
    say(f"{job.folder}: {len(plan.samples) - len(left)} of {len(plan.samples)} clips are there")
    progress = Progress(len(left), "clips drawn", "no clip is drawn", say)
    if left:
        for done in _in_tasks(job, left, min(workers, len(left))) if workers else draw_samples(job, left):
            progress.at(done)
    files = [job.folder / sample.file for sample in plan.samples]
    if lacking := sum(not file.exists() for file in files):
        raise PreflightError(
            f"{FIELD}: {lacking} of {len(left)} clips that were drawn did not appear in {job.folder}: give a folder "
            "that all nodes share, under one path"
        )
    return [*files, *([_save_sheet(job.folder, plan.samples)] if job.layout == "plain" else [])]


def draw_samples(job: Job, samples: Sequence[Sample]) -> Iterator[int]:
    """Draws and writes some clips, but for those that are there; yields the number that is done after each pass."""
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model: Model | None = None
    for begin in range(0, len(samples), job.batch):
        part = samples[begin : begin + job.batch]
        left = [sample for sample in part if not (job.folder / sample.file).exists()]
        if left:
            model = job.source.load() if model is None else model
            for sample, clip in zip(left, model.draw(left), strict=True):
                save_with_sound(clip, job.folder / sample.file, job.form)
        yield begin + len(part)


def _in_tasks(job: Job, samples: Sequence[Sample], workers: int) -> Iterator[int]:
    shares = [samples[i::workers] for i in range(workers)]
    for _ in in_tasks(draw_share, job, shares, {"num_gpus": job.gpus}, "generate"):
        yield sum((job.folder / sample.file).exists() for sample in samples)


def draw_share(job: Job, share: Sequence[Sample]) -> None:
    """A Ray task: draws a share of the clips on what it has reserved."""
    reserved_device(job.gpus)
    for _ in draw_samples(job, share):
        pass


def _settings(job: Job) -> dict[str, Any]:
    """All that the clips depend on besides prompt and seed, as the index has it."""
    drawing = dataclasses.asdict(job.source.drawing) | {"adapter": None}
    told = {name: value for name, value in drawing.items() if value not in (None, {}, False)}
    return {**job.source.identity(), **told, "layout": job.layout, "format": job.form.kind, "fps": job.form.fps}


def read_index(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and clips of a folder.

    Raises:
        ConfigError: its index cannot be read.
    """
    found = parse_json(read_text(folder / INDEX, FIELD), str(folder / INDEX))
    settings, samples = (found.get(key) for key in ("settings", "samples")) if isinstance(found, dict) else (None, None)
    if not isinstance(settings, dict) or not isinstance(samples, list):
        raise ConfigError(f"{FIELD}: {folder / INDEX} is not of this version; choose another folder")
    return settings, [entry for entry in samples if isinstance(entry, dict)]


def _refuse_others(folder: Path, settings: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Checks that a folder's clips are those of the plan, or that it has none; raises ConfigError if not."""
    if not (folder / INDEX).is_file():
        if present := next((sample.file for sample in samples if (folder / sample.file).exists()), None):
            raise ConfigError(f"{FIELD}: {folder / present} is there, but no {INDEX} says how it was drawn; choose "
                              "another folder")  # fmt: skip
        return
    before, entries = read_index(folder)
    for name in dict.fromkeys([*settings, *before]):
        if settings.get(name) != before.get(name):
            raise ConfigError(
                f"{FIELD}: the clips in {folder} were drawn with {name}: {before.get(name)}, not {settings.get(name)}; "
                "choose another folder"
            )
    known = {entry.get("file"): entry for entry in entries}
    for sample in samples:
        entry = known.get(sample.file)
        if entry is not None and (entry.get("prompt"), entry.get("seed")) != (str(sample.prompt), sample.seed):
            raise ConfigError(
                f"{FIELD}: {folder / sample.file} is of another prompt or seed ({quoted(entry.get('prompt'))}, "
                f"{entry.get('seed')}); choose another folder"
            )


def _write_index(folder: Path, settings: dict[str, Any], samples: Sequence[Sample]) -> None:
    entries: dict[str, dict[str, Any]] = {}
    if (folder / INDEX).is_file():
        entries = {str(entry.get("file")): entry for entry in read_index(folder)[1]}
    for sample in samples:
        entries[sample.file] = {"file": sample.file, "prompt": str(sample.prompt), "seed": sample.seed}
    with written_aside(folder / INDEX) as file:
        file.write_text(json.dumps({"settings": settings, "samples": list(entries.values())}, indent=1) + "\n")


def _write_beside(folder: Path, plan: Plan) -> None:
    for name, contents in plan.beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / name) as file:
            file.write_text(contents)
    images = {str(sample.prompt): sample.image for sample in plan.samples if sample.image is not None}
    if images:
        lines = [json.dumps({"prompt": prompt, "image": str(image.absolute())}) for prompt, image in images.items()]
        with written_aside(folder / PROMPTS) as file:
            file.write_text("\n".join(lines) + "\n")


def _save_sheet(folder: Path, samples: Sequence[Sample]) -> Path:
    rows: dict[str, list[Sample]] = {}
    for sample in samples:
        rows.setdefault(str(sample.prompt), []).append(sample)
    shown = list(rows.items())[:MOST_ROWS]
    clips = [
        (prompt, [(f"seed {sample.seed}", read_clip(folder / sample.file)) for sample in row[:MOST_COLUMNS]])
        for prompt, row in shown
    ]
    contact_sheet(clips).save(folder / SHEET)
    return folder / SHEET

"""``euphonium generate``: draws the clips of prompts or of whole suites, here or on many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from euphonium.errors import ConfigError
from euphonium.locks import writing_alone
from orchestrator.commands.arguments import (
    FramesOption,
    HeightOption,
    ModelArgument,
    PromptFileOption,
    ProtocolOption,
    SamplesOption,
    SeedOption,
    StepsOption,
    WidthOption,
    file_argument,
    given,
    prompt_argument,
    seed_list,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", parser=prompt_argument, help="What to draw; may be given several times."),
    ] = None,
    prompt_file: PromptFileOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=file_argument, metavar="FOLDER", help="Folder for the clips.")
    ] = Path("generated"),
    layout: Annotated[
        Literal["plain", "vbench", "vbench2", "geneval"],
        typer.Option(help="How files are named: by number, or as the evaluation of a suite looks for them."),
    ] = "plain",
    samples_per_prompt: SamplesOption = None,
    seed: SeedOption = 0,
    seeds: Annotated[
        str | None, typer.Option(metavar="S1,S2,...", help="Draw each prompt once with each of these seeds instead.")
    ] = None,
    steps: StepsOption = None,
    protocol: ProtocolOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    clip_format: Annotated[
        Literal["mp4", "gif", "png"] | None,
        typer.Option("--format", help="Default: mp4 for vbench and vbench2, png for geneval and images, else gif."),
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=1000, help="Frames a second of the files.")] = 8.0,
    base: Annotated[bool, typer.Option("--base", help="Of a run: the generator before training.")] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(parser=file_argument, metavar="FOLDER", help="Of a pipeline: an adapter to load into it."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of a pipeline's weights; default: float32.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of a pipeline; default: that of its class. A run has its own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Clips of a pass.")] = 1,
    workers: Annotated[int, typer.Option(min=0, max=10_000, help="Ray tasks; 0 draws in this process.")] = 0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, max=1000, help="GPUs of each task.")] = 0.0,
    threads: Annotated[int | None, typer.Option(min=1, max=1000, help="CPU threads of each process.")] = None,
) -> None:
    """Draw clips from a run, a checkpoint or a diffusers pipeline; the same command goes on where it was killed."""
    from euphonium.config import EvaluationConfig
    from orchestrator.commands.cli import say

    if not prompt and not prompt_file:
        raise ConfigError("there is nothing to draw: give --prompt or --prompt-file")
    with writing_alone([(output, "--output")]):
        from orchestrator.generation.clips import ClipFormat, format_for
        from orchestrator.generation.draw import PROMPTS, Job, draw_clips
        from orchestrator.generation.models import Drawing, find_model
        from orchestrator.generation.samples import Seeds, plan_samples, read_suite, texts

        drawing = Drawing(
            steps=EvaluationConfig().num_steps if steps is None else steps, protocol=protocol, base=base,
            size=given(height=height, width=width, frames=frames), adapter=adapter and adapter.resolve(), dtype=dtype,
            guidance_scale=guidance_scale,
        )  # fmt: skip
        source = find_model(model, drawing, output.resolve() / PROMPTS)
        asked = clip_format or {"vbench": "mp4", "vbench2": "mp4", "geneval": "png", "plain": None}[layout]
        job = Job(
            source=source, form=ClipFormat(format_for(asked, source.stills), fps), layout=layout,
            folder=output.resolve(), batch=batch, threads=threads, gpus=gpus_per_worker,
        )  # fmt: skip
        suite = texts(prompt or []) + read_suite(prompt_file or [])
        plan = plan_samples(suite, layout, job.form.kind, Seeds(seed, seed_list(seeds), samples_per_prompt))
        for path in draw_clips(job, plan, workers, say):
            say(str(path))

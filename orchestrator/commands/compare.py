"""``euphonium compare`` and ``tally``: two models side by side, for rewards and for people."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from euphonium.errors import ConfigError
from euphonium.locks import writing_alone
from orchestrator.commands.arguments import (
    FramesOption,
    HeightOption,
    NoiseSeedOption,
    PromptFileOption,
    PromptsOption,
    SamplesOption,
    StepsOption,
    WidthOption,
    file_argument,
    given,
    model_argument,
)

if TYPE_CHECKING:
    from orchestrator.comparison.models import Contender
    from orchestrator.generation.clips import ClipFormat

CONTENDER = "Run folder, checkpoint, pipeline, hub id, or base: the generator that the other one's run began with."


def compare(
    one: Annotated[str, typer.Argument(parser=model_argument, metavar="A", help=CONTENDER)],
    other: Annotated[str, typer.Argument(parser=model_argument, metavar="B", help=CONTENDER)],
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=file_argument, metavar="FOLDER", help="New folder for the result.")
    ] = Path("comparison"),
    prompt_file: PromptFileOption = None,
    prompts: PromptsOption = None,
    samples_per_prompt: SamplesOption = None,
    seed: NoiseSeedOption = None,
    steps: StepsOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    fps: Annotated[float, typer.Option(min=0.1, max=1000, help="Frames a second of the clips.")] = 8.0,
    question: Annotated[str, typer.Option(help="What people are asked.")] = "Which clip is better?",
) -> None:
    """Compare two models by the same prompts and noise: rewards with intervals, and a page for people to judge on.

    Prompts, rewards and settings are those of the first run among the two.
    """
    from orchestrator.commands.cli import say
    from orchestrator.generation.scoring import Asked

    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output: {output} is not empty; choose another folder")
    changes = given(prompts=prompts, samples_per_prompt=samples_per_prompt, seed=seed, num_steps=steps)
    asked = Asked(
        changes=changes, size=given(height=height, width=width, frames=frames), files=tuple(prompt_file or ())
    )
    with writing_alone([(output, "--output")]):
        from orchestrator.comparison.models import find_contenders
        from orchestrator.generation.clips import ClipFormat

        try:
            form = ClipFormat("mp4", fps)
            form.check()
        except ConfigError:
            form = ClipFormat("gif", fps)
        contenders, texts, seeds = find_contenders((one, other), asked)
        for line in compare_models(contenders, (texts, seeds), output.resolve(), (form, question), say):
            say(line)


def compare_models(
    contenders: list[Contender],
    asked: tuple[list[str], list[int]],
    folder: Path,
    page: tuple[ClipFormat, str],
    say: Callable[[str], None],
) -> list[str]:
    """Draws and scores both, and writes clips, ``comparison.json`` and ``judge.html``.

    Args:
        contenders: the two.
        asked: prompts and seeds.
        folder: where to write.
        page: format of the clips, and what people are asked.
        say: prints progress.

    Returns:
        What to tell the user.

    Raises:
        EuphoniumError: samples could not be drawn or scored.
    """
    from orchestrator.comparison.models import differences, draw_both, save_pairs, write_result
    from orchestrator.comparison.page import write_page
    from orchestrator.generation.scoring import Scorer

    (prompts, seeds), (form, question) = asked, page
    latents = draw_both(contenders, prompts, seeds, say)
    scorer = Scorer(contenders[0].config)
    scores = [scorer.score(side, prompts) for side in latents]
    folder.mkdir(parents=True, exist_ok=True)
    pairs = save_pairs(folder, latents, scorer, form, (prompts, seeds))
    study, compared = uuid.uuid4().hex[:12], differences(scores, prompts)
    write_result(folder, study, contenders, pairs, (scores, compared))
    written = write_page(folder, study, question, pairs)
    lines = [f"a: {contenders[0].name}", f"b: {contenders[1].name}"]
    for name, found in compared.items():
        gain, wins = found["difference"], found["b_better"]
        lines.append(
            f"{name}: {found['a']:.4f} -> {found['b']:.4f}, difference {gain['mean']:+.4f} "
            f"[{gain['low']:+.4f}, {gain['high']:+.4f}], b better in {wins['mean']:.0%} "
            f"[{wins['low']:.0%}, {wins['high']:.0%}]"
        )
    lines.append(f"{written}: open it in a browser; euphonium tally {folder} counts what people download from it")
    return lines


def tally(
    comparison: Annotated[
        Path, typer.Argument(parser=file_argument, metavar="COMPARISON", help="Folder that `compare` wrote.")
    ],
    results: Annotated[
        list[Path], typer.Argument(parser=file_argument, metavar="RESULTS...", help="Files of the judges.")
    ],
) -> None:
    """Count what people answered on the page of a comparison: wins with an interval, and how far they agree."""
    from orchestrator.commands.cli import say
    from orchestrator.comparison.judgements import counted, read_comparison, read_judgements

    found = read_comparison(comparison)
    names = {side: found[side]["name"] for side in ("a", "b")}
    say(json.dumps(names | {"tally": counted(read_judgements(results, found))}, indent=2))

"""Arguments of the command line: how their texts are read, and those that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from euphonium.errors import ConfigError
from euphonium.text_files import has_surrogates, quoted

MOST_SEED = 2**63


def file_argument(text: str) -> Path:
    """A path; ``~`` stays for us where the shell leaves it, as in ``--output=~/clips``."""
    from euphonium.config.base import user_path

    return user_path(text)


def prompt_argument(text: str) -> str:
    """A prompt; raises ConfigError for one that is empty."""
    if has_surrogates(text) or not text.strip():
        raise ConfigError(f"--prompt {quoted(text)}: a prompt is a text in UTF-8, and not empty; give one")
    return text


def negative_prompt_argument(text: str) -> str:
    """A negative prompt, which may be empty; raises ConfigError for bytes that are no text."""
    if has_surrogates(text):
        raise ConfigError(f"--negative-prompt {quoted(text)}: give a text in UTF-8")
    return text


def model_argument(text: str) -> str:
    """A folder, ``~`` expanded, or a hub id."""
    return str(file_argument(text))


def seed_list(text: str | None) -> tuple[int, ...]:
    """Seeds between commas; raises ConfigError for what is no seed."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 20 and int(part) < MOST_SEED for part in parts):
        raise ConfigError(f"--seeds {quoted(text)}: give whole numbers from 0 to 2**63 - 1, with commas between them")
    return tuple(map(int, parts))


def given(**options: int | None) -> dict[str, int]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


ModelArgument = Annotated[
    str,
    typer.Argument(
        parser=model_argument,
        metavar="MODEL",
        help="Run folder, checkpoint, folder of a diffusers pipeline (such as an export), or hub id.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(parser=file_argument, metavar="MODEL", help="Checkpoint or run folder.")]
PromptFileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--prompt-file",
        "-f",
        parser=file_argument,
        metavar="FILE_OR_FOLDER",
        help="Prompts: .txt, .jsonl or .json, or a folder of such files; may be given several times.",
    ),
]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, max=1_000_000, help="Samples a prompt; default: the run's, or the layout's.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=MOST_SEED - 1, help="Of the first clip; each has the next one.")]
StepsOption = Annotated[int | None, typer.Option(min=1, max=10_000, help="ODE steps; default: evaluation.num_steps.")]
ProtocolOption = Annotated[
    Literal["implicit", "inference_rgg", "distilled"] | None,
    typer.Option(
        help="Keep the reward gradient (inference_rgg), or sample the policy alone (distilled or implicit, whichever "
        "the run was trained for). Default: alone."
    ),
]
HeightOption = Annotated[int | None, typer.Option(help="Of the clips, in pixels; default: the model's.")]
WidthOption = Annotated[int | None, typer.Option(help="Of the clips, in pixels; default: the model's.")]
FramesOption = Annotated[int | None, typer.Option(help="Of a clip; default: the model's.")]
PromptsOption = Annotated[int | None, typer.Option(min=1, help="Number of prompts; default: the run's, or all.")]
NoiseSeedOption = Annotated[
    int | None, typer.Option(min=0, max=MOST_SEED - 1, help="Of the noise; default: the run's.")
]

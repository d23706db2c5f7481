"""Prompt files: texts and, for image-to-video, the first frame of each prompt's videos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from euphonium.errors import ConfigError

MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        text: the prompt.
        image: picture file of the video's first frame, or None.
    """

    text: str
    image: Path | None = None


def read_prompt_file(path: Path, field: str) -> list[Prompt]:
    """Reads a ``.txt`` file (one prompt a line) or a ``.jsonl`` file (objects with ``prompt`` and perhaps ``image``).

    Blank lines and, in ``.txt`` files, lines that begin with ``#`` are skipped. Image paths are relative to the file.

    Args:
        path: the file.
        field: the recipe's field that names it, for errors.

    Raises:
        ConfigError: the file cannot be read, or a line is not valid; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: cannot read {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (path.suffix != ".jsonl" and line.startswith("#")):
            continue
        where = f"{path}:{number}"
        prompt = _json_prompt(line, where, path.parent) if path.suffix == ".jsonl" else Prompt(line.strip())
        if len(prompt.text) > MAX_CHARACTERS:
            raise ConfigError(f"{where}: the prompt has {len(prompt.text)} characters, more than {MAX_CHARACTERS}")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{field}: {path} holds no prompt")
    return prompts


def prompt_images(files: Sequence[Path]) -> dict[str, Path]:
    """The pictures of all prompts of some files, by the prompts' texts.

    Raises:
        ConfigError: a file cannot be read, or one text has two pictures: prompts are identified by their text.
    """
    images: dict[str, Path] = {}
    for file in files:
        for prompt in read_prompt_file(file, "prompts"):
            if prompt.image is None:
                continue
            if images.setdefault(prompt.text, prompt.image) != prompt.image:
                raise ConfigError(
                    f"{file}: the prompt {prompt.text!r} has two images, {images[prompt.text]} and {prompt.image}; "
                    "word the prompts differently"
                )
    return images


def _json_prompt(line: str, where: str, folder: Path) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error.msg}") from error
    if (
        not isinstance(entry, dict)
        or not {"prompt"} <= set(entry) <= {"prompt", "image"}
        or not all(isinstance(value, str) for value in entry.values())
    ):
        raise ConfigError(f'{where}: a line is an object with the key "prompt", perhaps "image", and texts')
    if "image" not in entry:
        return Prompt(entry["prompt"].strip())
    image = (folder / entry["image"]).resolve()
    if not image.is_file():
        raise ConfigError(f"{where}: there is no image {image}; images are given relative to the file")
    return Prompt(entry["prompt"].strip(), image)

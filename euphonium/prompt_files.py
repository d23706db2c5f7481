"""Prompt files: texts and, for image-to-video, the first frame of each prompt's videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from euphonium.errors import ConfigError
from euphonium.text_files import file_beside, parse_json, read_lines

MAX_CHARACTERS = 4000
ENDINGS = (".txt", ".jsonl")


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

    Blank lines and, in ``.txt`` files, lines that begin with ``#`` are skipped. Image paths are relative to the file;
    upper and lower case of the file's ending are the same.

    Args:
        path: the file.
        field: the recipe's field that names it, for errors.

    Raises:
        ConfigError: the file cannot be read, or a line is not valid; names file and line.
    """
    lines = read_lines(path, field, ENDINGS, _advice(path))
    is_json = path.suffix.lower() == ".jsonl"
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (not is_json and line.startswith("#")):
            continue
        where = f"{path}:{number}"
        prompt = _json_prompt(line, where, path.parent) if is_json else Prompt(line.strip())
        if len(prompt.text) > MAX_CHARACTERS:
            raise ConfigError(
                f"{where}: the prompt has {len(prompt.text)} characters; shorten it to {MAX_CHARACTERS} or fewer"
            )
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{field}: {path} holds no prompt; give one a line")
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
    entry = parse_json(line, where)
    if (
        not isinstance(entry, dict)
        or not {"prompt"} <= set(entry) <= {"prompt", "image"}
        or not all(isinstance(value, str) for value in entry.values())
    ):
        raise ConfigError(f'{where}: a line should be an object with the key "prompt", perhaps "image", and texts')
    text = entry["prompt"].strip()
    if not text:
        raise ConfigError(f"{where}: the prompt is empty; give it a text, or leave the line out")
    return Prompt(text, file_beside(folder, entry["image"], f"{where}: image") if "image" in entry else None)


def _advice(path: Path) -> str:
    if path.suffix.lower() != ".json":
        return ""
    return 'Of a JSON list, such as videos2caption.json, make a .jsonl file of {"prompt": "its caption"} in every line'

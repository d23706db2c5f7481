"""Prompt files: texts and, for image-to-video, the first frame of each prompt's videos, with whatever else is known.

What else a line holds travels with the text, as a :class:`DescribedPrompt`: every role handles prompts as texts, and
rewards that ask for it read the rest with :func:`metadata_of`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from euphonium.errors import ConfigError
from euphonium.text_files import file_beside, parse_json, read_lines

MAX_CHARACTERS = 4000
ENDINGS = (".txt", ".jsonl", ".json")
# What an entry of a .json file calls its text, the first of these that it has: those of DanceGRPO's
# ``videos2caption.json``, after preprocessing and before, that of a .jsonl file, and that of ``VBench_full_info.json``.
TEXTS = ("caption", "cap", "prompt", "prompt_en")


class DescribedPrompt(str):
    """A prompt's text, with what its file says besides; equal to the text alone.

    Attributes:
        metadata: entries of its line besides ``prompt`` and ``image``.

    Example:
        >>> prompt = DescribedPrompt("a red car", {"objects": ["car"]})
        >>> prompt == "a red car", metadata_of(prompt), metadata_of("a red car")
        (True, {'objects': ['car']}, {})
    """

    __slots__ = ("metadata",)
    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any]) -> DescribedPrompt:
        """The text with its metadata."""
        described = super().__new__(cls, text)
        described.metadata = metadata
        return described

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # str's own has the text alone
        """What pickle and copy make it of."""
        return str(self), self.metadata


def metadata_of(prompt: str) -> Mapping[str, Any]:
    """What a prompt's file says of it besides text and image; nothing for a plain text."""
    return prompt.metadata if isinstance(prompt, DescribedPrompt) else {}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        text: the prompt.
        image: picture file of the video's first frame, or None.
        metadata: what else the line holds.
    """

    text: str
    image: Path | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def described(self) -> str:
        """The text, with the metadata if there are any."""
        return DescribedPrompt(self.text, self.metadata) if self.metadata else self.text


def read_prompt_file(path: Path, field: str) -> list[Prompt]:
    """Reads a prompt file.

    A ``.txt`` file has one prompt a line, a ``.jsonl`` file an object a line with ``prompt``, perhaps ``image``, and
    anything else; a ``.json`` file is a list of such objects, whose text may be called ``caption`` or ``cap``, too, as
    in DanceGRPO's ``videos2caption.json``. Blank lines and, in ``.txt`` files, lines that begin with ``#`` are skipped.
    Image paths are relative to the file; upper and lower case of the file's ending are the same.

    Args:
        path: the file.
        field: the recipe's field that names it, for errors.

    Raises:
        ConfigError: the file cannot be read, or a line is not valid; names file and line.
    """
    lines = read_lines(path, field, ENDINGS)
    ending = path.suffix.lower()
    if ending == ".txt":
        kept = ((f"{path}:{n}", line.strip()) for n, line in enumerate(lines, start=1) if not line.startswith("#"))
        found = [(place, Prompt(text)) for place, text in kept if text]
    else:
        read = _lines_of_json if ending == ".jsonl" else _list_of_json
        found = [(place, _prompt(entry, place, path.parent)) for place, entry in read(path, lines)]
    for place, prompt in found:
        if len(prompt.text) > MAX_CHARACTERS:
            raise ConfigError(
                f"{place}: the prompt has {len(prompt.text)} characters; shorten it to {MAX_CHARACTERS} or fewer"
            )
    if not found:
        raise ConfigError(f"{field}: {path} holds no prompt; give one a line")
    return [prompt for _, prompt in found]


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


def _lines_of_json(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and contents of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        entry = parse_json(line, place)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(f'{place}: a line should be an object with a text under the key "prompt"')
        yield place, entry


def _list_of_json(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and contents of every entry, with its text under ``prompt``."""
    entries = parse_json("\n".join(lines), str(path))
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: a .json file of prompts should be a list of objects with the key {TEXTS[0]!r}")
    for number, entry in enumerate(entries, start=1):
        place = f"{path}: entry {number}"
        key = next((name for name in TEXTS if isinstance(entry, dict) and name in entry), None)
        # Captions of one video by several captioners are a list: the first is taken.
        text = entry[key] if key is not None else None
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str):
            raise ConfigError(f"{place} should be an object with a text under one of the keys {', '.join(TEXTS)}")
        yield place, {name: value for name, value in entry.items() if name != key} | {"prompt": text}


def _prompt(entry: Mapping[str, Any], place: str, folder: Path) -> Prompt:
    text, image = entry["prompt"].strip(), entry.get("image")
    if not text:
        raise ConfigError(f"{place}: the prompt is empty; give it a text, or leave the line out")
    if "image" in entry and not isinstance(image, str):
        raise ConfigError(f'{place}: the key "image" should name a picture file')
    metadata = {name: value for name, value in entry.items() if name not in ("prompt", "image")}
    return Prompt(text, file_beside(folder, image, f"{place}: image") if image is not None else None, metadata)

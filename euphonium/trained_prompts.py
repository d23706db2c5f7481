"""Which prompts a reward model was trained on: a file of hashes in its folder, so that a run can hold its own apart.

Hashes, not texts: preference data may not be for everybody who gets the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from euphonium.errors import ConfigError
from euphonium.files import written_aside

FILE = "trained_prompts.json"
DIGITS = 16


def write_trained_prompts(folder: Path, prompts: Iterable[str]) -> None:
    """Notes the prompts that the reward model in a folder was trained on."""
    marks = sorted({_mark(prompt) for prompt in prompts})
    with written_aside(folder / FILE) as file:
        file.write_text(json.dumps({"sha256": marks}) + "\n")


def trained_among(folder: Path, prompts: Iterable[str]) -> list[str]:
    """Those of some prompts that the reward model in a folder was trained on; none where it does not say.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        marks = set(json.loads(file.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({error!r}); copy the reward model again, or remove it") from error
    return [prompt for prompt in dict.fromkeys(map(str, prompts)) if _mark(prompt) in marks]


def _mark(prompt: str) -> str:
    return hashlib.sha256(" ".join(prompt.split()).encode()).hexdigest()[:DIGITS]

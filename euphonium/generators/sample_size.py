"""The size of a run's samples, which goes with an export: diffusers' pipelines have defaults of their own."""

from __future__ import annotations

import json
from pathlib import Path

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError

SIZE_FILE = "euphonium.json"
FIELDS = ("height", "width", "frames")

# Some of height, width and frames.
SampleSize = dict[str, int]


def write_sample_size(config: ModelConfig, folder: Path) -> None:
    """Writes height, width and frames beside a pipeline's ``model_index.json``."""
    size = {field: getattr(config, field) for field in FIELDS}
    (folder / SIZE_FILE).write_text(json.dumps(size, indent=1) + "\n")


def read_sample_size(folder: Path) -> SampleSize:
    """The size that goes with a pipeline; empty if none does.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / SIZE_FILE
    if not file.is_file():
        return {}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        size = {field: held[field] for field in FIELDS}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(file, repr(error)) from error
    if not all(type(value) is int and value > 0 for value in size.values()):
        raise _damaged(file, f"not whole numbers above 0: {size}")
    return size


def _damaged(file: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{file} does not hold the size of the samples ({reason}); export again, or remove it and give --height, "
        "--width and --frames"
    )

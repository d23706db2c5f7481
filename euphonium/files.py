"""Files whose contents must be known, and be on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from euphonium.errors import CheckpointError


def sha256(path: Path) -> str:
    """Hash of a file's contents, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_and_flush(path: Path) -> str:
    """:func:`sha256` of a file that is on disk when this returns."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256(path)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Makes what a file system refuses an error that says what to do.

    Args:
        what: is written, for the error.
        folder: to which; it exists.

    Raises:
        CheckpointError: the file system refused, for example because it is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 1e6
        raise CheckpointError(
            f"{what} could not be written to {folder}, which has {free:.0f} MB free: {error}. Earlier checkpoints are "
            "as they were: make room, then go on with resume=auto"
        ) from error

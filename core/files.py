"""Files whose contents must be known, and be on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256(path: Path) -> str:
    """Hash of a file's contents, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_and_flush(path: Path) -> str:
    """:func:`sha256` of a file that is on disk when this returns."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256(path)

"""Atomic writes of files and folders: written under another name, flushed to disk, then renamed.

A committed folder holds a manifest with the size and SHA-256 of every file in it, against which a reader verifies it
first. What the files mean is up to the callers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from euphonium.errors import CheckpointError

MANIFEST = "manifest.json"
# Files hashed at a time.
THREADS = 4


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Replaces a file atomically: it holds its old contents or all of the new ones, whatever happens.

    Args:
        path: the file; its folder exists.

    Yields:
        The path to write to; if an error is raised meanwhile, the file stays as it was.
    """
    aside = path.with_name(f"{path.name}.tmp")
    yield aside
    flush(aside)
    aside.rename(path)
    flush(path.parent)


def commit_folder(aside: Path, target: Path, version: int) -> None:
    """Renames a filled folder to the target, replacing an older one, after hashing and flushing all of its files.

    Args:
        aside: the filled folder, beside the target.
        target: its final path.
        version: version of the contents' format, for :func:`verify_folder`.
    """
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(_flushed_hash, files))
    entries = {
        str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps({"format": version, "files": entries}, indent=1) + "\n")
    flush(manifest)
    if target.exists():
        shutil.rmtree(target)
    for inside in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
        flush(inside)
    aside.rename(target)
    flush(target.parent)


def verify_folder(folder: Path, version: int) -> None:
    """Checks every file of a committed folder against its manifest.

    Args:
        folder: the committed folder.
        version: version of the format that the caller reads.

    Raises:
        OtherFormatError: it is in another format.
        CheckpointError: something is missing or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: its {MANIFEST} cannot be read ({error})") from error
    if found != version:
        raise OtherFormatError(
            f"{folder} has checkpoint format {found}, this version reads format {version}; "
            "resume with the version that wrote it, or start anew from its exported weights"
        )
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} is missing or has another size than the manifest says")
    with ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(lambda name: sha256(folder / name), files))
    for (name, (_, expected)), digest in zip(files.items(), digests, strict=True):
        if digest != expected:
            raise CheckpointError(f"{folder}: {name} has other contents than the manifest says")


class OtherFormatError(CheckpointError):
    """A checkpoint that another version of this project wrote, and this one cannot read."""


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turns errors of the file system into one that says what to do.

    Args:
        what: what is being written, for the error: "the checkpoint of iteration 3".
        folder: where it is written; it exists.

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


def _flushed_hash(path: Path) -> str:
    flush(path)
    return sha256(path)

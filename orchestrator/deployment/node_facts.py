"""What ``euphonium doctor`` finds out on a node, in a task there: facts alone, which the driver judges."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Those whose versions must agree between nodes.
PACKAGES = ("ray", "torch", "deepspeed", "diffusers", "transformers", "safetensors", "pydantic")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """Facts of one node.

    Attributes:
        host: its name.
        interpreter: path of the Python that tasks run in.
        versions: of Python and the packages; of those that are installed.
        gpus: name and MiB of each GPU, as the driver has them.
        shared_memory: bytes of ``/dev/shm``, in all and free.
        disk: bytes of the disk with Ray's session, in all and free.
        open_files: limit of open files of a process.
        clock: seconds since 1970.
        read: contents of the canary; None if it is not there.
        unreadable: the paths that the recipe needs and that cannot be read here.
    """

    host: str
    interpreter: str
    versions: dict[str, str]
    gpus: list[tuple[str, int]]
    shared_memory: tuple[int, int]
    disk: tuple[int, int]
    open_files: int
    clock: float
    read: str | None
    unreadable: list[str]


def collect(session: str, canary: str | None, needed: Sequence[str]) -> NodeFacts:
    """Looks at the node that this runs on.

    Args:
        session: folder of Ray's session.
        canary: file that the driver has written where the runs go; None if there is none.
        needed: files and folders that the recipe reads.
    """
    memory, disk = (shutil.disk_usage(path) for path in (SHARED_MEMORY, _nearest(Path(session))))
    return NodeFacts(
        host=os.uname().nodename,
        interpreter=sys.executable,
        versions={"python": ".".join(map(str, sys.version_info[:3])), **_versions()},
        gpus=_gpus(),
        shared_memory=(memory.total, memory.free),
        disk=(disk.total, disk.free),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock=time.time(),
        read=None if canary is None else _contents(Path(canary)),
        unreadable=[path for path in needed if not _readable(Path(path))],
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            # Builds for CPUs and for CUDA are the same version.
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _gpus() -> list[tuple[str, int]]:
    """Asks NVIDIA's driver: CUDA would take memory, and Ray hides GPUs from tasks that reserve none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in listed.splitlines() if line.strip()]
    return [(name.strip(), int(mib)) for name, _, mib in rows]


def _nearest(path: Path) -> Path:
    """The path, or the closest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _contents(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _readable(path: Path) -> bool:
    """Whether a file can be opened, or a folder listed and its first file opened."""
    try:
        if path.is_dir():
            files = (inner for inner in path.rglob("*") if inner.is_file())
            path = next(files, path)
            return path.is_dir() or os.access(path, os.R_OK)
        with path.open("rb") as stream:
            stream.read(1)
    except OSError:
        return False
    return True

"""Renews requirements.lock: what pip would install of pyproject.toml today, with torch as it is there.

    python deploy/renew_lock.py [OPTION OF PIP]...

Nothing is installed, and an error leaves the lock as it was. torch stays at its exact version: a CPU build, where the
index offers one. A choice that would pull the packages of CUDA is refused.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
# Everything that the tests run; trackers bring many packages, and are each user's own choice.
EXTRAS = ("lora", "video", "rewards", "assets", "dev")
CUDA = re.compile(r"(nvidia|cuda)[-_.].*|(pytorch-)?triton.*", re.IGNORECASE)


class LockError(Exception):
    """The lock cannot be renewed."""


def requirements(project: Mapping[str, Any]) -> list[str]:
    """What is asked for: the package's own requirements and those of the extras, and what builds source packages."""
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra]), "setuptools"]


def versions(lock: str) -> dict[str, str]:
    """The packages of a lock, by name."""
    return dict(line.split("==") for line in lock.split() if "==" in line and not line.startswith("#"))


def resolved(wanted: Sequence[str], options: Sequence[str]) -> dict[str, str]:
    """Versions that pip chooses, by name.

    Raises:
        LockError: pip finds none.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-build-isolation",
               "--quiet", "--report", "-", *options, *wanted]  # fmt: skip
    # DeepSpeed's setup would compile for the GPU that is here.
    done = subprocess.run(
        command, env=os.environ | {"DS_BUILD_OPS": "0"}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise LockError("pip could not choose versions (see above); the lock is as it was")
    found = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    # An index for CPUs calls its build 2.13.0+cpu, others do not; the lock is for both.
    return {entry["name"]: entry["version"].partition("+")[0] for entry in found}


def renewed(lock: str, project: Mapping[str, Any], options: Sequence[str]) -> str:
    """The text of a new lock, with the old one's torch and its comment.

    Raises:
        LockError: the old one pins no torch, pip finds no versions, or they are for CUDA.
    """
    torch = versions(lock).get("torch")
    if torch is None:
        raise LockError("the lock pins no torch, which has to stay as it is: add torch==VERSION")
    found = resolved([*requirements(project), f"torch=={torch}"], options)
    if cuda := sorted(name for name in found if CUDA.fullmatch(name)):
        raise LockError(
            f"torch {torch} of this index is for CUDA, with {', '.join(cuda[:3])}...; give an index of CPU builds: "
            "make lock PIP_OPTIONS='--index-url https://download.pytorch.org/whl/cpu "
            "--extra-index-url https://pypi.org/simple'"
        )
    comment = [line for line in lock.splitlines() if line.startswith("#")]
    return "\n".join([*comment, *(f"{name}=={found[name]}" for name in sorted(found, key=str.lower))]) + "\n"


def main(options: Sequence[str]) -> str | None:
    """Writes the lock anew, and prints what is other than before; returns an error."""
    before = LOCK.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        text = renewed(before, project, options)
    except LockError as error:
        return f"error: {error}"
    aside = LOCK.with_suffix(".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(LOCK)
    old, new = versions(before), versions(text)
    for name in sorted(old.keys() | new.keys(), key=str.lower):
        if old.get(name) != new.get(name):
            sys.stdout.write(f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}\n")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

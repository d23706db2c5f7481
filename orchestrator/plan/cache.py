"""Measurements that are kept on disk, because the large models take half a minute.

A measurement is known by everything that it depends on: configurations, versions of the libraries, and the sources of
what is measured and of what measures it. There is nothing to clear by hand.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
# What is measured, and what measures it.
SOURCES = (
    "euphonium/generators/*.py",
    "euphonium/rewards/process.py",
    "euphonium/dynamics/*.py",
    "learners/policy/objective.py",
    "orchestrator/plan/*.py",
)
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def folder() -> Path:
    """Where measurements are kept: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "euphonium" / "plan"


def remembered(what: Mapping[str, object], compute: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """A measurement, from the disk if it was made before.

    Args:
        what: everything that it depends on, as JSON values.
        compute: makes it.
    """
    file = folder() / f"{_digest(what)}.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    found = dict(compute())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(found))
        written.replace(file)
    except OSError as error:
        log.info("a measurement could not be kept: %s", error)
    return found


def _digest(what: Mapping[str, object]) -> str:
    whole = {"what": what, "sources": _sources(), "versions": _versions()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


@lru_cache
def _sources() -> str:
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@lru_cache
def _versions() -> dict[str, str]:
    installed = {}
    for library in LIBRARIES:
        try:
            installed[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            installed[library] = ""
    return installed

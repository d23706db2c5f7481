"""Runs of a study, each a process of its own with one thread; what is finished is kept and never run again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from euphonium.config import load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "embedded"


@dataclass(frozen=True)
class Method:
    """A row of a table: a recipe with overrides.

    Attributes:
        name: how the tables call it.
        recipe: file in ``recipes/embedded``.
        overrides: ``key=value`` arguments.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One run: a method with a seed, for a number of iterations.

    Attributes:
        method: what is run.
        seed: of prompts, noise and chosen steps.
        common: overrides that all methods of the study share.
    """

    method: Method
    seed: int
    common: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``benchmarks/single_process.py``."""
        recipe = (RECIPES / self.method.recipe).relative_to(ROOT)
        return [str(recipe), *self.common, *self.method.overrides, f"seed={self.seed}"]

    @cached_property
    def key(self) -> str:
        """Name of its file, from all settings of the run and the weights that it begins with."""
        recipe, *overrides = self.arguments
        settings = load_config(ROOT / recipe, overrides).model_dump_json()
        digest = hashlib.sha256(f"{settings} {weights_digest()}".encode()).hexdigest()[:12]
        plain = "".join(c if c.isalnum() else "-" for c in self.method.name).strip("-")
        return f"{plain}-s{self.seed}-{digest}"


@dataclass
class Record:
    """What a run printed.

    Attributes:
        trial: the run.
        lines: one record an iteration, with metrics; the first is the evaluation before training.
    """

    trial: Trial
    lines: list[dict[str, float]] = field(default_factory=list)

    def curve(self, metric: str = "eval/total/mean") -> dict[int, float]:
        """The metric by iteration, where it was measured."""
        return {int(line["iteration"]): line[metric] for line in self.lines if metric in line}


@lru_cache(maxsize=1)
def weights_digest() -> str:
    """Digest of the embedded weights: runs of other weights are other runs."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "euphonium" / "embedded").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_all(trials: Sequence[Trial], folder: Path, jobs: int) -> list[Record]:
    """Runs what is not finished, some at a time; returns all records in order.

    A run that is cut off by a kill leaves a ``.part`` file behind, and is done again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [trial for trial in trials if not (folder / f"{trial.key}.jsonl").exists()]
    print(f"{len(trials) - len(waiting)} of {len(trials)} runs are done already", flush=True)
    say, begun, done = threading.Lock(), time.monotonic(), 0

    def one(trial: Trial) -> None:
        nonlocal done
        run_one(trial, folder)
        with say:
            done += 1
            minutes = (time.monotonic() - begun) / 60
            final = list(read(trial, folder).curve().values())[-1]
            print(
                f"[{done}/{len(waiting)}] {trial.method.name}, seed {trial.seed}: {final:.4f} "
                f"({minutes:.0f} min, about {minutes / done * (len(waiting) - done):.0f} left)",
                flush=True,
            )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, waiting))
    return [read(trial, folder) for trial in trials]


def run_one(trial: Trial, folder: Path) -> None:
    """Runs a trial to its end.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    part, errors = folder / f"{trial.key}.part", folder / f"{trial.key}.err"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "single_process.py"), *trial.arguments]
    with part.open("w") as out, errors.open("w") as err:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=err, check=False).returncode
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {errors.read_text()[-2000:]}")
    errors.unlink()
    part.rename(folder / f"{trial.key}.jsonl")


def read(trial: Trial, folder: Path) -> Record:
    """The record of a finished run."""
    text = (folder / f"{trial.key}.jsonl").read_text()
    return Record(trial, [json.loads(line) for line in text.splitlines() if line.startswith("{")])

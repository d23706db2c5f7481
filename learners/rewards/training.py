"""The training loop of process and outcome reward models: batches, micro-batches, averages, checkpoints, stopping.

What is trained is a :class:`Task`; how it is stepped is a :class:`~learners.engine.reward_engine.RewardEngine`. A batch
follows from the seed and the number of the update alone, so a training that was killed and taken up again ends with
the weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from euphonium.config import PrmRefreshConfig, RewardOptimizerConfig
from euphonium.errors import CheckpointError, TrainingError
from euphonium.files import hash_and_flush, sha256
from learners.engine.reward_engine import KINDS, RewardEngine

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
BEST_FILE = "best.safetensors"
PROGRESS_FILE = "progress.jsonl"
PROGRESS_EVERY_S = 10.0

Report = Callable[[dict[str, Any]], None]


class Task(Protocol):
    """What a reward model learns from."""

    def batch(self, update: int) -> Any:
        """The batch of an update: ``pairs_per_update`` items, the same on every rank."""
        ...

    def losses(self, model: nn.Module, batch: Any, part: slice) -> Tensor:
        """Losses of some items of a batch, ``[items]``."""
        ...

    def evaluate(self, engine: RewardEngine, pairs: int) -> dict[str, Any]:
        """Numbers on held-out pairs, among them ``mean_accuracy``; all ranks call it, and get the same."""
        ...


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        update: updates done.
        losses: since the last measurement.
        best: best mean accuracy so far.
        best_update: when it was measured.
        stale: measurements since then.
        stopped: whether patience ran out.
    """

    update: int = 0
    losses: list[float] = field(default_factory=list)
    best: float = -1.0
    best_update: int = 0
    stale: int = 0
    stopped: bool = False


def fit(
    engine: RewardEngine, task: Task, settings: RewardOptimizerConfig, folder: Path, mark: str, report: Report
) -> Progress:
    """Trains to the last update or until patience runs out, from the newest checkpoint if there is one.

    Args:
        engine: holds the model.
        task: holds the preferences.
        settings: of the optimisation.
        folder: of checkpoints and of the best weights; shared by all ranks.
        mark: of the recipe; a checkpoint of another one is refused.
        report: takes records of progress, on rank 0.

    Returns:
        Where the training ended.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        TrainingError: a loss that is not finite.
    """
    progress = load_newest(engine, folder, mark)
    if engine.rank == 0 and progress.update:
        report({"resumed": progress.update})
    began, first, shown = time.monotonic(), progress.update, time.monotonic()
    while progress.update < settings.updates and not progress.stopped:
        progress.losses.append(_update(engine, task, settings, progress.update))
        progress.update += 1
        done = progress.update
        last = done == settings.updates
        rate = (done - first) / (time.monotonic() - began)
        record: dict[str, Any] = {"update": done, "updates": settings.updates, "updates_per_s": rate}
        if last or done % settings.evaluate_every == 0:
            record |= {"loss": float(np.mean(progress.losses))} | _measure(engine, task, settings, folder, progress)
            shown = -math.inf
            record["measured"] = True
        if engine.rank == 0 and time.monotonic() - shown > PROGRESS_EVERY_S:
            report({"loss": float(np.mean(progress.losses or [0.0]))} | record)
            shown = time.monotonic()
        if last or progress.stopped or done % settings.checkpoint_every == 0:
            save(engine, folder, progress, mark)
    return progress


def learning_rate(settings: RewardOptimizerConfig | PrmRefreshConfig, update: int) -> float:
    """Rate of an update, counted from 0: linear over the first twentieth, then a cosine to zero."""
    warmup = max(1, settings.updates // 20)
    cosine = 0.5 * (1 + math.cos(math.pi * update / settings.updates))
    return settings.learning_rate * min((update + 1) / warmup, cosine)


def _update(engine: RewardEngine, task: Task, settings: RewardOptimizerConfig, update: int) -> float:
    engine.set_learning_rate(learning_rate(settings, update))
    batch, count = task.batch(update), settings.pairs_per_update
    share = count // engine.world_size
    begin, end = engine.rank * share, (engine.rank + 1) * share
    total = 0.0
    for low in range(begin, end, settings.pairs_per_micro_batch):
        high = min(low + settings.pairs_per_micro_batch, end)
        losses = task.losses(engine.model, batch, slice(low, high))
        # Ranks average their gradients; every one divides by its own share.
        loss = losses.sum() / share
        engine.backward(loss, last=high == end)
        total += float(loss.detach())
    engine.update_average(min(settings.ema_decay, (update + 1) / (update + 10)))
    mean = float(engine.sum(torch.tensor(total, dtype=torch.float64))) / engine.world_size
    if not math.isfinite(mean):
        raise TrainingError(
            f"the loss of update {update + 1} is not finite: lower optimizer.learning_rate, or look for samples that "
            "are not finite; the last checkpoint is good"
        )
    return mean


def _measure(
    engine: RewardEngine, task: Task, settings: RewardOptimizerConfig, folder: Path, progress: Progress
) -> dict[str, Any]:
    progress.losses.clear()
    with engine.averaged():
        found = task.evaluate(engine, settings.evaluation_pairs)
    if settings.patience is not None:
        if found["mean_accuracy"] > progress.best:
            progress.best, progress.best_update, progress.stale = found["mean_accuracy"], progress.update, 0
            best = engine.whole("average")
            if engine.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(best, folder / f"{BEST_FILE}.tmp")
                (folder / f"{BEST_FILE}.tmp").rename(folder / BEST_FILE)
        else:
            progress.stale += 1
            progress.stopped = progress.stale >= settings.patience
    return found


def final_weights(
    engine: RewardEngine, progress: Progress, settings: RewardOptimizerConfig, folder: Path
) -> dict[str, Tensor]:
    """The averaged weights to publish, on rank 0: of the best measurement with patience, else of the last update.

    The engine's averages become these weights, on all ranks.
    """
    if settings.patience is not None and progress.best_update != progress.update:
        with safe_open(folder / BEST_FILE, framework="pt") as stream:
            engine.restore("average", stream.get_tensor)
    return engine.whole("average")


def save(engine: RewardEngine, folder: Path, progress: Progress, mark: str) -> None:
    """Writes a checkpoint: whole or not there, and the one before it goes when it is. All ranks must call it."""
    target = folder / f"update_{progress.update:07d}"
    aside = folder / f"{target.name}.tmp"
    if engine.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    hashes = {}
    for kind in KINDS:
        tensors = engine.whole(kind)
        if engine.rank == 0:
            save_file(tensors, aside / f"{kind}.safetensors")
            hashes[kind] = hash_and_flush(aside / f"{kind}.safetensors")
    if engine.rank == 0:
        state = aside / STATE_FILE
        state.write_text(json.dumps({"mark": mark, "sha256": hashes, **asdict(progress)}, indent=1) + "\n")
        hash_and_flush(state)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        for old in folder.glob("update_*"):
            if old.name < target.name:
                shutil.rmtree(old, ignore_errors=True)


def load_newest(engine: RewardEngine, folder: Path, mark: str) -> Progress:
    """Takes up the newest whole checkpoint of a folder; all ranks must call it.

    Raises:
        CheckpointError: it was made with another recipe.
    """
    for found in sorted(folder.glob("update_*"), reverse=True):
        if found.suffix == ".tmp":
            continue
        state = json.loads((found / STATE_FILE).read_text())
        if state.pop("mark") != mark:
            raise CheckpointError(
                f"{found} belongs to a training with another recipe; give this one another name, or remove {folder}"
            )
        hashes = state.pop("sha256")
        files = {kind: found / f"{kind}.safetensors" for kind in KINDS}
        damaged = [kind for kind, file in files.items() if not file.is_file() or sha256(file) != hashes[kind]]
        if damaged:
            log.warning("skipping a damaged checkpoint: %s of %s is not what was written", damaged[0], found)
            continue
        for kind, file in files.items():
            with safe_open(file, framework="pt") as stream:
                engine.restore(kind, stream.get_tensor)
        progress = Progress(**state)
        engine.set_steps(progress.update)
        return progress
    return Progress()

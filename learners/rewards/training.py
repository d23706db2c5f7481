"""The training loop of reward models: updates, moving averages, measurements, checkpoints, early stopping.

A :class:`Task` says what is trained, a :class:`~learners.engine.engine.Engine` how. A batch depends only on the seed
and the number of the update, so a training that was killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, Required, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from euphonium.config import RewardOptimizerConfig
from euphonium.errors import CheckpointError, TrainingError
from euphonium.files import OtherFormatError, commit_folder, verify_folder, written_aside
from learners.engine.engine import Engine
from learners.engine.schedule import learning_rate
from learners.engine.shards import Shards, read_shards, write_shard

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
BEST_FILE = "best.safetensors"
PROGRESS_FILE = "progress.jsonl"
PROGRESS_EVERY_S = 10.0
# The last measurement takes this many times the pairs of those during training.
FINAL_MEASUREMENT = 5
# Format of checkpoints; format 1 had whole tensors.
FORMAT = 2

Batch = TypeVar("Batch")
Report = Callable[[Mapping[str, object]], None]


class Measurement(TypedDict, total=False):
    """Results on held-out preferences; process reward models have lists, with a value for each tenth of sigma.

    The best weights are those of the highest ``mean_accuracy``.
    """

    mean_accuracy: Required[float]
    accuracy: float | list[float]
    accuracy_without_margin: list[float]
    margin: float
    calibration_error: float | list[float]
    label_accuracy: float
    pairs: int
    training_pairs: int
    held_out_pairs: int


class Objective(Protocol[Batch]):
    """The training loss of a reward model: batches and their losses."""

    def batch(self, update: int) -> Batch:
        """The batch of an update: ``pairs_per_update`` items, the same on every rank."""
        ...

    def losses(self, model: nn.Module, batch: Batch, part: slice) -> Tensor:
        """Losses of the items in a part of a batch, ``[items]``."""
        ...


class Task(Objective[Batch], Protocol[Batch]):
    """Training loss and measurement of a reward model."""

    def evaluate(self, engine: Engine, pairs: int) -> Measurement:
        """Measures the model on held-out pairs; all ranks must call it, and get the same result."""
        ...


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        update: number of updates done.
        losses: loss of each update since the last measurement.
        best: best mean accuracy so far.
        best_update: number of updates at which it was measured.
        stale: number of measurements since then.
        stopped: whether training stopped early, because patience ran out.
    """

    update: int = 0
    losses: list[float] = field(default_factory=list)
    best: float = -1.0
    best_update: int = 0
    stale: int = 0
    stopped: bool = False


class PromptwiseItems:
    """Draws items with all prompts equally likely, however many items each has.

    Args:
        items: ``[items, columns]``.
        prompts: ``[items]``, index of each item's prompt.
    """

    def __init__(self, items: NDArray[np.int64], prompts: NDArray[np.int64]) -> None:
        order = np.argsort(prompts, kind="stable")
        self._by_prompt = np.split(items[order], np.flatnonzero(np.diff(prompts[order])) + 1)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draws items ``[count, columns]``, with replacement."""
        prompts = rng.integers(len(self._by_prompt), size=count)
        return np.stack([self._by_prompt[p][rng.integers(len(self._by_prompt[p]))] for p in prompts])


def shared_passes(engine: Engine, count: int) -> Iterator[tuple[int, bool]]:
    """Indices of the passes of a measurement that this rank makes, and whether their results count.

    All ranks make the same number of passes, as ZeRO-3 requires; a rank without one of its own repeats the last one.
    """
    for first in range(0, count, engine.world_size):
        mine = first + engine.rank
        yield min(mine, count - 1), mine < count


def fit(
    engine: Engine, task: Task[Batch], settings: RewardOptimizerConfig, folder: Path, fingerprint: str, report: Report
) -> Progress:
    """Trains to the last update or until patience runs out, from the newest checkpoint if there is one.

    Args:
        engine: engine of the model.
        task: training loss and measurement.
        settings: settings of the optimiser.
        folder: folder of checkpoints and of the best weights, shared by all ranks.
        fingerprint: fingerprint of the recipe; a checkpoint with another one is refused.
        report: called with records of progress, on rank 0.

    Returns:
        Where the training ended.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        TrainingError: the loss is not finite.
    """
    progress = load_newest(engine, folder, fingerprint)
    if engine.rank == 0 and progress.update:
        report({"resumed": progress.update})
    began, first, shown = time.monotonic(), progress.update, time.monotonic()
    while progress.update < settings.updates and not progress.stopped:
        progress.losses.append(train_update(engine, task, settings, progress.update))
        progress.update += 1
        if not math.isfinite(progress.losses[-1]):
            raise TrainingError(
                f"the loss of update {progress.update} is not finite: lower optimizer.learning_rate, or look for "
                "samples that are not finite; the last checkpoint is good"
            )
        done = progress.update
        last = done == settings.updates
        speed = (done - first) / (time.monotonic() - began)
        record: dict[str, object] = {"update": done, "updates": settings.updates, "updates_per_s": speed}
        if last or done % settings.evaluate_every == 0:
            record["loss"] = float(np.mean(progress.losses))
            record.update(_measure(engine, task, settings, folder, progress), measured=True)
            shown = -math.inf
        if engine.rank == 0 and time.monotonic() - shown > PROGRESS_EVERY_S:
            report({"loss": float(np.mean(progress.losses or [0.0]))} | record)
            shown = time.monotonic()
        if last or progress.stopped or done % settings.checkpoint_every == 0:
            save(engine, folder, progress, fingerprint)
    return progress


def rate(settings: RewardOptimizerConfig, update: int) -> float:
    """Learning rate of an update (from 0): a linear rise over the first twentieth, and a cosine to zero."""
    warmup = max(1, settings.updates // 20)
    return learning_rate(settings.learning_rate, update, settings.updates, warmup, "whole_cosine")


def train_update(engine: Engine, objective: Objective[Batch], settings: RewardOptimizerConfig, update: int) -> float:
    """Makes one optimiser step on a batch, of which every rank takes its share; all ranks must call it.

    Args:
        engine: engine of the model.
        objective: training loss.
        settings: settings of the optimiser.
        update: number of the update, from 0.

    Returns:
        The mean loss over the ranks, which may not be finite.
    """
    engine.set_learning_rate(rate(settings, update))
    batch, count = objective.batch(update), settings.pairs_per_update
    share = count // engine.world_size
    begin, end = engine.rank * share, (engine.rank + 1) * share
    total = 0.0
    for low in range(begin, end, settings.pairs_per_micro_batch):
        high = min(low + settings.pairs_per_micro_batch, end)
        losses = objective.losses(engine.model, batch, slice(low, high))
        # Ranks average their gradients; every one divides by its own share.
        loss = losses.sum() / share
        engine.backward(loss, last=high == end)
        total += float(loss.detach())
    engine.update_averages(min(settings.ema_decay, (update + 1) / (update + 10)))
    return float(engine.sum(torch.tensor(total, dtype=torch.float64))) / engine.world_size


def _measure(
    engine: Engine, task: Task[Batch], settings: RewardOptimizerConfig, folder: Path, progress: Progress
) -> Measurement:
    progress.losses.clear()
    with engine.averaged():
        found = task.evaluate(engine, settings.evaluation_pairs)
    if settings.patience is not None:
        if found["mean_accuracy"] > progress.best:
            progress.best, progress.best_update, progress.stale = found["mean_accuracy"], progress.update, 0
            best = engine.whole("average")
            if engine.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                with written_aside(folder / BEST_FILE) as aside:
                    save_file(best, aside)
        else:
            progress.stale += 1
            progress.stopped = progress.stale >= settings.patience
    return found


def final_weights(
    engine: Engine, progress: Progress, settings: RewardOptimizerConfig, folder: Path
) -> dict[str, Tensor]:
    """The averaged weights to keep, whole on rank 0: the best measured ones with ``patience``, else the last.

    The engine's averages are set to these weights, on all ranks.
    """
    if settings.patience is not None and progress.best_update != progress.update:
        with safe_open(folder / BEST_FILE, framework="pt") as stream:
            engine.restore_averages(stream.get_tensor)
    return engine.whole("average")


def save(engine: Engine, folder: Path, progress: Progress, fingerprint: str) -> None:
    """Writes a checkpoint atomically, then removes older ones; all ranks must call it."""
    target = folder / f"update_{progress.update:07d}"
    aside = folder / f"{target.name}.tmp"
    if engine.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    engine.barrier()
    write_shard(engine, aside)
    engine.barrier()
    if engine.rank == 0:
        state = {"format": FORMAT, "mark": fingerprint, "world_size": engine.world_size, **asdict(progress)}
        (aside / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        commit_folder(aside, target, FORMAT)
        for old in folder.glob("update_*"):
            if old.name < target.name:
                shutil.rmtree(old, ignore_errors=True)


def load_newest(engine: Engine, folder: Path, fingerprint: str) -> Progress:
    """Restores the newest undamaged checkpoint of a folder, if there is one; all ranks must call it.

    Raises:
        CheckpointError: it belongs to another recipe, or has another format.
    """
    for found in sorted(folder.glob("update_*"), reverse=True):
        if found.suffix == ".tmp":
            continue
        try:
            verify_folder(found, FORMAT)
        except OtherFormatError as error:
            raise CheckpointError(f"{error}, give this training another name, or remove {folder}") from error
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        state = json.loads((found / STATE_FILE).read_text())
        if state.pop("mark") != fingerprint:
            raise CheckpointError(
                f"{found} belongs to a training with another recipe; give this one another name, or remove {folder}"
            )
        world_size, _ = state.pop("world_size"), state.pop("format")
        with Shards(found, world_size) as shards:
            progress = Progress(**state)
            read_shards(engine, shards, progress.update)
        return progress
    return Progress()

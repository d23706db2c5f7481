"""Runs the training of a reward model, in this process or on every rank of a group under Ray Train."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from euphonium.config import OrmConfig, PrmConfig, RewardOptimizerConfig, RewardTrainingConfig
from euphonium.wire.devices import local_device
from learners.engine.engine import Engine
from learners.engine.local import LocalEngine
from learners.engine.zero3 import join_group, reward_engine
from learners.rewards.training import PROGRESS_FILE, Measurement, Report, Task, final_weights, fit

CHECKPOINTS = "checkpoints"
RESULT_FILE = "result.json"
# Fields that do not change what is learned: a training may go on after they were changed.
INCIDENTAL = {"output_dir", "target", "threads", "learner", "gradient_checkpointing", "gpu_memory_gib", "planned"}
INCIDENTAL_OPTIMIZER = {"checkpoint_every", "evaluate_every", "evaluation_pairs", "patience", "pairs_per_micro_batch"}


class RewardTraining(Protocol):
    """Model, loss and result of one kind of reward model."""

    @property
    def model(self) -> nn.Module:
        """The model, on the CPU; the parameters to train require gradients."""
        ...

    @property
    def task(self) -> Task[Any]:
        """Training loss and measurement."""
        ...

    @property
    def settings(self) -> RewardOptimizerConfig:
        """Settings of the optimiser."""
        ...

    def result(self, engine: Engine) -> Measurement:
        """The final measurement of the engine's model as it is; all ranks must call it."""
        ...

    def save(self, weights: dict[str, Tensor], result: Measurement) -> None:
        """Writes the trained model; called on rank 0."""
        ...


def open_training(config: PrmConfig | OrmConfig, device: torch.device) -> RewardTraining:
    """Loads the model and its preferences."""
    if isinstance(config, PrmConfig):
        from learners.rewards.process import PrmTraining

        return PrmTraining(config, device)
    from learners.rewards.outcome import OrmTraining

    return OrmTraining(config, device)


def recipe_fingerprint(config: RewardTrainingConfig) -> str:
    """Hash of all fields of a recipe that affect the trained weights."""
    values = config.model_dump(mode="json", exclude=INCIDENTAL)
    for source in (values.get("prompts"), values["preferences"]):
        if source is not None and source["embeddings"] is None:
            del source["embeddings"]
    values["optimizer"] = {n: v for n, v in values["optimizer"].items() if n not in INCIDENTAL_OPTIMIZER}
    if isinstance(config, PrmConfig):
        # A training that began when there was no other grid, and no pair was turned round, goes on.
        if config.pairs.grid == "linear":
            del values["pairs"]["grid"]
        if not config.pairs.flipped:
            del values["pairs"]["flipped"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def train(config: PrmConfig | OrmConfig, engine: Engine, training: RewardTraining, report: Report) -> None:
    """Trains, measures, and writes the model and ``result.json``; all ranks must call it.

    Args:
        config: the recipe.
        engine: engine of ``training.model``.
        training: model and task.
        report: called with records of progress, on rank 0.
    """
    folder = config.run_dir / CHECKPOINTS
    progress = fit(engine, training.task, training.settings, folder, recipe_fingerprint(config), report)
    weights = final_weights(engine, progress, training.settings, folder)
    with engine.averaged():
        result = training.result(engine)
    if engine.rank == 0:
        training.save(weights, result)
        trained = {"updates": progress.update, "weights_of_update": progress.best_update or progress.update}
        (config.run_dir / RESULT_FILE).write_text(json.dumps({**result, **trained}, indent=1) + "\n")


def train_here(config: PrmConfig | OrmConfig, report: Report) -> None:
    """Trains in this process."""
    torch.set_num_threads(config.threads)
    device = local_device()
    training = open_training(config, device)
    train(config, LocalEngine(training.model, training.settings, device), training, report)


def train_rank(config: PrmConfig | OrmConfig, report: Report) -> None:
    """Trains as one rank of a group, which environment variables describe."""
    assert config.learner is not None
    torch.set_num_threads(config.learner.threads)
    device = join_group(config.learner.num_gpus)
    training = open_training(config, device)
    train(config, reward_engine(training.model, training.settings, config.learner), training, report)


def reward_train_loop(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: ``kind`` (``prm`` or ``orm``), and ``config``, the recipe as JSON values.
    """
    kind = PrmConfig if settings["kind"] == "prm" else OrmConfig
    config: PrmConfig | OrmConfig = kind.model_validate(settings["config"])
    train_rank(config, progress_file(config.run_dir))


def progress_file(run_dir: Path) -> Report:
    """A report function that appends to the training's progress file, which the driver reads."""

    def report(record: Mapping[str, object]) -> None:
        with (run_dir / PROGRESS_FILE).open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    return report

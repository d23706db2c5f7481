"""Training of a process reward model on prepared samples, by one process or by the ranks of a group."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from euphonium.config import PrmConfig
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from learners.engine.engine import Engine
from learners.rewards.preference import PrmTask, accuracies, gaps_by_noise
from learners.rewards.preference_files import flipped_pairs
from learners.rewards.prm_data import is_scored, open_prepared
from learners.rewards.training import FINAL_MEASUREMENT, Measurement


class PrmTraining:
    """Model and preferences of a process reward model; implements :class:`learners.rewards.worker.RewardTraining`."""

    def __init__(self, config: PrmConfig, device: torch.device) -> None:
        self.config = config
        self.settings = config.optimizer
        self.family = open_generator(config.model)
        torch.manual_seed(config.seed)
        self.model = ProcessRewardModel.from_generator(self.family, config.blocks)
        self.model.for_training(gradient_checkpointing=config.gradient_checkpointing)
        data = config.run_dir / "data"
        train, self.held_out = (open_prepared(data / part, config.pairs.margin) for part in ("train", "held_out"))
        if config.pairs.flipped:
            train = dataclasses.replace(train, pairs=flipped_pairs(train.pairs, config.pairs.flipped, config.seed))
        self.pairs = len(train.pairs), len(self.held_out.pairs)
        self.task = PrmTask(train, self.held_out, config.optimizer, config.seed, device)
        self.scored = is_scored(data / "held_out")

    def result(self, engine: Engine) -> Measurement:
        """The final measurement, on more held-out pairs than during training; all ranks must call it."""
        count = FINAL_MEASUREMENT * self.settings.evaluation_pairs
        found = self.task.evaluate(engine, count)
        found["training_pairs"], found["held_out_pairs"] = self.pairs
        if self.scored:
            every = open_prepared(self.config.run_dir / "data" / "held_out", 0.0).pairs
            data = dataclasses.replace(self.held_out, pairs=every)
            gaps = gaps_by_noise(engine, data, every, per_tenth=count)
            found["accuracy_without_margin"] = accuracies(gaps)
            found["margin"] = self.config.pairs.margin
        return found

    def save(self, weights: dict[str, Tensor], result: Measurement) -> None:
        """Writes the model with its trained weights."""
        torch.manual_seed(self.config.seed)
        model = ProcessRewardModel.from_generator(self.family, self.config.blocks).float()
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, unknown
        measured = {
            "accuracy": result.get("accuracy"),
            "accuracy_without_margin": result.get("accuracy_without_margin"),
            "calibration_error": result.get("calibration_error"),
        }
        notes = {f"held_out_{n}": np.round(value, 4).tolist() for n, value in measured.items() if value is not None}
        margin = {"margin": result["margin"]} if "margin" in result else {}
        model.save(self.config.target, getattr(torch, self.config.save_dtype), **notes, **margin)

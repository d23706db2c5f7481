"""Training of outcome reward models: Bradley-Terry, with or without ties, and binary labels.

Of two samples with rewards ``r_a`` and ``r_b``, ``d = r_a - r_b``:

* Bradley-Terry: ``P(a wins) = sigmoid(d)``.
* Rao-Kupper adds ties with a threshold ``theta > 1``: ``P(a wins) = sigmoid(d - log theta)``, and a tie has what is
  left, ``(theta^2 - 1) sigmoid(d - log theta) sigmoid(-d - log theta)``. A clear winner must then lead by a margin of
  about ``log theta``, within which ties pull rewards together.
* Labels: ``P(label 1) = sigmoid(r)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from euphonium.config import OrmConfig
from euphonium.errors import ConfigError
from euphonium.rewards.outcome_model import OutcomeModel
from learners.engine.engine import Engine
from learners.rewards.preference import bradley_terry, calibration_error
from learners.rewards.preference_files import UNLABELLED, PreferenceTable, open_preferences
from learners.rewards.training import FINAL_MEASUREMENT, Measurement, PromptwiseItems, shared_passes
from learners.rewards.video_files import read_frames

# Decoded videos kept in memory, already cut to the frames and size that the model sees.
CACHED_VIDEOS = 512


def rao_kupper(gap: Tensor, tie: Tensor, theta: float) -> Tensor:
    """Negative log-likelihood of each pair in the Rao-Kupper model.

    Args:
        gap: reward of the first sample minus that of the second, ``[pairs]``.
        tie: whether neither won, bool ``[pairs]``; else the first did.
        theta: threshold, above 1.
    """
    shift = math.log(theta)
    won = functional.logsigmoid(gap - shift)
    tied = math.log(theta**2 - 1) + won + functional.logsigmoid(-gap - shift)
    return -torch.where(tie, tied, won)


class OrmTask:
    """Training and measurement of an outcome reward model; implements :class:`learners.rewards.training.Task`."""

    def __init__(
        self, model: OutcomeModel, train: PreferenceTable, held_out: PreferenceTable, config: OrmConfig,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.device, self.held_out = config, device, held_out
        self._model = model
        self._train = train
        labels = config.objective == "bce"
        # One row an item: first sample, second sample (itself for labels), and whether it is a tie or has label 1.
        items = _labelled(train) if labels else _paired(train, ties=config.objective == "bradley_terry_ties")
        for part, count in (("training", len(items)), ("held-out", self._measurable(held_out))):
            if not count:
                raise ConfigError(
                    f"the {part} preferences hold nothing for objective {config.objective}: it needs "
                    + ("samples with labels" if labels else "winner and loser, or both labels within a prompt")
                )
        self._drawn = PromptwiseItems(items, train.prompt[items[:, 0]])
        self._frames = lru_cache(maxsize=CACHED_VIDEOS)(self._read)

    def _measurable(self, table: PreferenceTable) -> int:
        return len(table.pairs) + (len(_labelled(table)) if self.config.objective == "bce" else 0)

    def batch(self, update: int) -> NDArray[np.int64]:
        """The batch of an update, int64 ``[pairs_per_update, 3]``, with all prompts equally likely.

        A row is the first sample, the second (the first again for labels), and whether it is a tie or has label 1.
        """
        rng = np.random.default_rng([self.config.seed, update])
        return self._drawn.draw(self.config.optimizer.pairs_per_update, rng)

    def losses(self, model: nn.Module, batch: NDArray[np.int64], part: slice) -> Tensor:
        """Losses of some rows of a batch, ``[rows]``."""
        items = batch[part]
        flag = torch.from_numpy(items[:, 2]).to(self.device)
        if self.config.objective == "bce":
            rewards = self.rewards(model, self._train, items[:, 0])
            return functional.binary_cross_entropy_with_logits(rewards, flag.float(), reduction="none")
        first, second = self.rewards(model, self._train, items[:, :2].T.reshape(-1)).chunk(2)
        if self.config.objective == "bradley_terry_ties":
            return rao_kupper(first - second, flag.bool(), self.config.tie_threshold)
        return bradley_terry(first, second)

    def rewards(self, model: nn.Module, table: PreferenceTable, samples: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Rewards of some samples of a table, ``[samples]``."""
        frames = [self._frames(table.files[i]) for i in samples]
        prompts = [table.prompts[table.prompt[i]] for i in samples]
        found: Tensor = model(**self._model.inputs(frames, prompts, self.device))
        return found

    def _read(self, path: Path) -> Tensor:
        return self._model.frames_of(torch.from_numpy(read_frames(path)).permute(0, 3, 1, 2))

    def evaluate(self, engine: Engine, pairs: int) -> Measurement:
        """Accuracy and calibration error on at most ``pairs`` held-out pairs; with labels, also their accuracy."""
        table, found = self.held_out, Measurement(mean_accuracy=math.nan)
        rng = np.random.default_rng(0)
        if len(table.pairs):
            chosen = table.pairs[rng.permutation(len(table.pairs))[:pairs]]
            scores = self._scored(engine, chosen.T.reshape(-1))
            gaps = scores[: len(chosen)] - scores[len(chosen) :]
            found["accuracy"] = found["mean_accuracy"] = float((gaps > 0).mean())
            found["calibration_error"], found["pairs"] = calibration_error(gaps), len(chosen)
        if self.config.objective == "bce":
            labelled = _labelled(table)
            labelled = labelled[rng.permutation(len(labelled))[:pairs]]
            right = (self._scored(engine, labelled[:, 0]) > 0) == (labelled[:, 2] == 1)
            found["label_accuracy"] = float(right.mean()) if len(right) else math.nan
            found["mean_accuracy"] = found["mean_accuracy"] if len(table.pairs) else found["label_accuracy"]
        return found

    def _scored(self, engine: Engine, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rewards of held-out samples, the same on every rank; the ranks share the work."""
        size = 2 * self.config.optimizer.pairs_per_micro_batch
        rewards = torch.zeros(len(samples), dtype=torch.float64)
        starts = list(range(0, len(samples), size))
        for number, counts in shared_passes(engine, len(starts)):
            begin = starts[number]
            part = samples[begin : begin + size]
            with torch.no_grad():
                values = self.rewards(engine.model, self.held_out, part)
            if counts:
                rewards[begin : begin + len(part)] = values.double().cpu()
        return np.asarray(engine.sum(rewards).numpy())


def prepare(model: OutcomeModel, config: OrmConfig) -> None:
    """Makes the parts of a model trainable that a recipe trains."""
    model.requires_grad_(True)
    backbone = model.backbone
    if config.model.trained == "head":
        backbone.requires_grad_(False)
    elif config.model.trained == "language":
        backbone.model.vision_tower.requires_grad_(False)
    if backbone.lm_head.weight is not backbone.get_input_embeddings().weight:
        # The language-model head is no part of the reward.
        backbone.lm_head.requires_grad_(False)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable()


class OrmTraining:
    """Model and preferences of an outcome reward model; implements :class:`learners.rewards.worker.RewardTraining`."""

    def __init__(self, config: OrmConfig, device: torch.device) -> None:
        self.config = config
        self.settings = config.optimizer
        self.model: OutcomeModel = self._fresh()
        prepare(self.model, config)
        train, held_out = open_preferences(config.preferences, config.seed)
        self.task = OrmTask(self.model, train, held_out, config, device)

    def _fresh(self) -> OutcomeModel:
        torch.manual_seed(self.config.seed)
        return OutcomeModel.from_backbone(self.config.model)

    def result(self, engine: Engine) -> Measurement:
        """The final measurement, on more held-out pairs than during training; all ranks must call it."""
        return self.task.evaluate(engine, FINAL_MEASUREMENT * self.settings.evaluation_pairs)

    def save(self, weights: dict[str, Tensor], result: Measurement) -> None:
        """Writes the model with its trained weights."""
        model = self._fresh()
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, unknown
        notes = {f"held_out_{name}": round(value, 4) for name, value in result.items() if isinstance(value, float)}
        model.save(self.config.target, objective=self.config.objective, **notes)


def _paired(table: PreferenceTable, *, ties: bool) -> NDArray[np.int64]:
    rows = [np.column_stack([table.pairs, np.zeros(len(table.pairs), dtype=np.int64)])]
    if ties:
        rows.append(np.column_stack([table.ties, np.ones(len(table.ties), dtype=np.int64)]))
    return np.concatenate(rows)


def _labelled(table: PreferenceTable) -> NDArray[np.int64]:
    samples = np.flatnonzero(table.label != UNLABELLED)
    return np.column_stack([samples, samples, table.label[samples]])

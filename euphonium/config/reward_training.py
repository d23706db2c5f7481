"""Recipes that train reward models: what all share, then those of process and of outcome reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from euphonium.config.base import (
    Decay,
    Name,
    Node,
    NonNegativeFloat,
    PassSize,
    PathOrHubId,
    Planned,
    Seed,
    Steps,
    UserPath,
)
from euphonium.config.pools import TrainingGroupConfig
from euphonium.config.rewards import OutcomeRewardConfig
from euphonium.config.sampling import ModelConfig, NoiseGridConfig, PromptsConfig


class PreferencesConfig(Node):
    """Preferences in JSON lines: pairs, or samples with binary labels that are paired within their prompt."""

    train: UserPath
    """File of the training preferences; paths in it are relative to its folder."""
    held_out: UserPath | None = None
    """File of the preferences that accuracy is measured on; null holds prompts of ``train`` out."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts of ``train`` that is held out where no file is."""
    embeddings: UserPath | None = None
    """For a process reward model, the preferences' prompts encoded already, as in ``prompts.embeddings``; null encodes
    them."""


class RewardOptimizerConfig(Node):
    """Training of a reward model on pairs: AdamW, a moving average, checkpoints and when to stop."""

    updates: PositiveInt
    """Optimiser steps."""
    pairs_per_update: PositiveInt = 32
    """Pairs (or labelled samples) in a batch, over all ranks."""
    pairs_per_micro_batch: PositiveInt = 32
    """Pairs in one forward and backward pass of one rank."""
    learning_rate: PositiveFloat = 3e-4
    """Peak rate; rises linearly over the first twentieth, then falls to zero along a cosine."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Decay = 0.998
    """Decay of the moving average of the weights, which is what is saved."""
    evaluate_every: PositiveInt = 500
    """Updates between measurements of the held-out accuracy."""
    evaluation_pairs: PositiveInt = 400
    """Held-out pairs of a measurement (a tenth of sigma each); the last one takes five times as many."""
    patience: PositiveInt | None = None
    """Stop after this many measurements without a better accuracy, and keep the best weights; null never stops."""
    checkpoint_every: PositiveInt = 500
    """Updates between checkpoints, from which the same command goes on."""


class RewardTrainingConfig(Node):
    """Settings that trainings of process and outcome reward models share."""

    name: Name
    """Name of the training and of its folder."""
    output_dir: UserPath = Path("runs")
    """Where its folder is made."""
    seed: Seed = 0
    """Seed of samples, pairs and noise."""
    target: UserPath
    """Folder that the trained model is written to."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights on disk."""
    threads: PositiveInt = 1
    """CPU threads."""
    learner: TrainingGroupConfig | None = None
    """ZeRO-3 ranks under Ray Train; null trains in this process, on its GPU if it has one."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of each GPU, as ``pools.gpu_memory_gib`` of ``train``."""
    planned: Planned = Field(default_factory=dict)
    """What the plan chose where the recipe says ``auto``; a training writes it into its own recipe."""

    @property
    def run_dir(self) -> Path:
        """Folder of this training."""
        return self.output_dir / self.name


def shares_are_equal(optimizer: RewardOptimizerConfig, learner: TrainingGroupConfig | None) -> None:
    """Checks that the ranks can share a batch equally: under ZeRO-3 all of them must make the same passes.

    Raises:
        ValueError: they cannot; names both fields.
    """
    if learner is not None and optimizer.pairs_per_update % learner.num_workers:
        raise ValueError(
            f"optimizer.pairs_per_update ({optimizer.pairs_per_update}) is no multiple of learner.num_workers "
            f"({learner.num_workers}): every rank takes the same share of a batch"
        )


class PairsConfig(NoiseGridConfig):
    """Preference pairs drawn from the generator itself and ranked by the outcome rewards."""

    section: ClassVar[str] = "pairs"

    samples_per_prompt: Annotated[int, Field(ge=2)] = 24
    """Samples of every training prompt."""
    held_out_samples_per_prompt: Annotated[int, Field(ge=2)] = 16
    """Samples of every held-out prompt, for the accuracy."""
    num_steps: Steps = 10
    """ODE steps of the samples."""
    samples_per_pass: PassSize = 16
    """Most samples in one forward pass of the generator; a pass that does not fit is halved for good. ``auto`` leaves
    it to the plan."""
    margin: NonNegativeFloat = 0.1
    """Pairs whose weighted outcome rewards differ by less are left out: their order is mostly noise."""
    flipped: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training pairs whose order is turned round, to study what a bad reward model does to a run."""


class PrmConfig(RewardTrainingConfig):
    """Training of a process reward model from preferences (Euphonium, section 4.2)."""

    blocks: PositiveInt = 8
    """Blocks of the generator's transformer that make the trunk, counted from its input."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's activations in the backward pass to save memory."""

    model: ModelConfig
    preferences: PreferencesConfig | None = None
    """Preferences that exist; null draws samples of ``prompts`` and ranks them by ``outcome``."""
    prompts: PromptsConfig | None = None
    """Prompts of the samples that are drawn."""
    outcome: list[OutcomeRewardConfig] = Field(default_factory=list)
    """Outcome rewards whose weighted sum ranks the samples that are drawn."""
    pairs: PairsConfig = PairsConfig()
    optimizer: RewardOptimizerConfig

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.preferences is None and (self.prompts is None or not self.outcome):
            raise ValueError("set preferences (pairs that exist), or prompts and outcome (samples that are drawn)")
        if self.outcome and not any(reward.weight for reward in self.outcome):
            raise ValueError(
                "outcome: samples are ranked by the weighted rewards, all of which have weight 0; give one a weight"
            )
        if self.preferences is not None and (self.prompts is not None or self.outcome):
            raise ValueError(
                "preferences exclude prompts and outcome: a training has one source of pairs; leave the other out"
            )
        shares_are_equal(self.optimizer, self.learner)
        return self


class BackboneConfig(Node):
    """The vision-language model under the scalar head, and what it sees of a video."""

    path: PathOrHubId
    """Folder or hub id of an InternVL model of transformers, for example ``OpenGVLab/InternVL3-1B-hf``."""
    revision: str | None = None
    """Commit of the hub repository; leave unset for a folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the backbone computes in; its weights are trained in float32."""
    frames: PositiveInt = 8
    """Frames of a video that it sees, evenly spaced."""
    max_prompt_tokens: PositiveInt = 256
    """Prompts are cut to this many tokens."""
    trained: Literal["all", "language", "head"] = "all"
    """Parts that are trained: everything, all but the vision tower, or the head alone."""


class OrmOptimizerConfig(RewardOptimizerConfig):
    """Training of an outcome reward model."""

    learning_rate: PositiveFloat = 1e-5
    """Peak rate; rises linearly over the first twentieth, then falls to zero along a cosine."""
    pairs_per_micro_batch: PositiveInt = 2
    """Pairs (or labelled samples) in one forward and backward pass of one rank."""
    ema_decay: Decay = 0.99
    """Decay of the moving average of the weights, which is what is saved."""


class OrmConfig(RewardTrainingConfig):
    """Training of an outcome reward model from preferences (Euphonium, section 5.1)."""

    model: BackboneConfig
    preferences: PreferencesConfig
    objective: Literal["bradley_terry", "bradley_terry_ties", "bce"] = "bradley_terry"
    """Pairs; pairs with ties (Rao-Kupper); or the labels of single samples."""
    tie_threshold: Annotated[float, Field(gt=1)] = 2.0
    """Rao-Kupper's theta: two equally good samples are a tie with probability (theta - 1) / (theta + 1)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    optimizer: OrmOptimizerConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.preferences.embeddings is not None:
            raise ValueError(
                "preferences.embeddings are for process reward models: an outcome reward model reads the texts; leave "
                "them out"
            )
        shares_are_equal(self.optimizer, self.learner)
        return self

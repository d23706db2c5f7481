"""Recipes of outcome reward models."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from euphonium.config.base import Decay, Node
from euphonium.config.prm import PreferencesConfig, RewardOptimizerConfig, RewardTrainingConfig, shares_are_equal


class BackboneConfig(Node):
    """The vision-language model under the scalar head, and what it sees of a video."""

    path: str
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
        shares_are_equal(self.optimizer, self.learner)
        return self

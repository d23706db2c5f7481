"""Recipes of process reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from core.config.base import Decay, Name, Node, NonNegativeFloat
from core.config.rewards import OutcomeRewardConfig
from core.config.sampling import ModelConfig, PromptsConfig


class PairsConfig(Node):
    """Preference pairs drawn from the generator itself and ranked by the outcome rewards."""

    samples_per_prompt: Annotated[int, Field(ge=2)] = 24
    """Samples of every training prompt."""
    held_out_samples_per_prompt: Annotated[int, Field(ge=2)] = 16
    """Samples of every held-out prompt, for the accuracy."""
    num_steps: PositiveInt = 10
    """ODE steps of the samples."""
    shift: PositiveFloat = 3.0
    """Time shift of the samples."""
    margin: NonNegativeFloat = 0.1
    """Pairs whose weighted outcome rewards differ by less are left out: their order is mostly noise."""


class PrmOptimizerConfig(Node):
    """Training of a process reward model."""

    updates: PositiveInt
    """Optimiser steps."""
    pairs_per_update: PositiveInt = 32
    """Pairs in a batch."""
    learning_rate: PositiveFloat = 3e-4
    """Peak rate; rises linearly over the first twentieth, then falls to zero along a cosine."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Decay = 0.998
    """Decay of the moving average of the weights, which is what is saved."""
    evaluate_every: PositiveInt = 500
    """Updates between measurements of the held-out accuracy."""


class PrmConfig(Node):
    """Training of a process reward model from preferences (Euphonium, section 4.2)."""

    name: Name
    """Name of the training and of its folder."""
    output_dir: Path = Path("runs")
    """Where its folder is made."""
    seed: int = 0
    """Of samples, pairs and noise."""
    target: Path
    """Folder that the trained model is written to."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights on disk."""
    blocks: PositiveInt = 8
    """Blocks of the generator's transformer that make the trunk, counted from its input."""
    threads: PositiveInt = 1
    """CPU threads."""

    model: ModelConfig
    prompts: PromptsConfig
    outcome: Annotated[list[OutcomeRewardConfig], Field(min_length=1)]
    """Outcome rewards whose weighted sum ranks the samples."""
    pairs: PairsConfig = PairsConfig()
    optimizer: PrmOptimizerConfig

    @property
    def run_dir(self) -> Path:
        """Folder of this training."""
        return self.output_dir / self.name

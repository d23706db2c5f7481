"""Latents whose score is the mean of one channel: something that a model can learn in seconds."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from euphonium.config import RewardOptimizerConfig
from learners.engine.engine import Engine
from learners.rewards.preference import Preferences
from learners.rewards.preference_files import ranked_pairs
from learners.rewards.training import Task

CPU = torch.device("cpu")


def toy_preferences(count: int = 6, prompts: int = 4, seed: int = 0, margin: float = 0.3) -> Preferences:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count * prompts, 16, 5, 4, 4, generator=generator)
    latents[:, 3] += 2 * torch.randn(count * prompts, 1, 1, 1, generator=generator)
    conditioning = {
        "encoder_hidden_states": torch.randn(prompts, 9, 64, generator=generator),
        "encoder_attention_mask": torch.ones(prompts, 9),
        "pooled_projections": torch.randn(prompts, 64, generator=generator),
    }
    prompt, score = np.repeat(np.arange(prompts), count), latents[:, 3].mean(dim=(1, 2, 3)).double().numpy()
    pairs = ranked_pairs(prompt, score, margin)
    return Preferences(
        latents=latents, latent_shape=(16, 5, 4, 4), prompt=prompt, conditioning=conditioning, pairs=pairs
    )


def toy_settings(**changes: object) -> RewardOptimizerConfig:
    values = {
        "updates": 6, "pairs_per_update": 8, "pairs_per_micro_batch": 3, "learning_rate": 1e-3, "ema_decay": 0.9,
        "evaluate_every": 3, "evaluation_pairs": 16, "checkpoint_every": 2, "max_grad_norm": 0.5,
    }  # fmt: skip
    return RewardOptimizerConfig(**(values | changes))


class Mortal:
    """A task whose process dies in an update."""

    def __init__(self, task: Task, die_in: int) -> None:
        self.task, self.die_in = task, die_in

    def batch(self, update: int) -> Any:
        if update == self.die_in:
            raise KeyboardInterrupt
        return self.task.batch(update)

    def losses(self, model: nn.Module, batch: Any, part: slice) -> Tensor:
        return self.task.losses(model, batch, part)

    def evaluate(self, engine: Engine, pairs: int) -> dict[str, Any]:
        return self.task.evaluate(engine, pairs)

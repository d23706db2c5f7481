"""What changes from update to update of a run: the learning rate, and the weight of the KL penalty."""

from __future__ import annotations

import math

from euphonium.config import KlConfig, RunConfig
from euphonium.dynamics.kl import KlController


def learning_rate(config: RunConfig, updates_done: int) -> float:
    """Rate of the next update: linear warm-up, then the schedule over all updates of the run."""
    optimizer = config.optimizer
    total = config.iterations * config.objective.updates_per_iteration
    warmup = optimizer.warmup_updates
    if updates_done < warmup:
        return optimizer.learning_rate * (updates_done + 1) / warmup
    progress = min(1.0, (updates_done - warmup) / max(1, total - warmup))
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[optimizer.schedule]
    return optimizer.learning_rate * factor


def kl_controller(kl: KlConfig | None) -> KlController | None:
    """The controller of the penalty's weight in its initial state, if the recipe has one."""
    return None if kl is None or kl.controller is None else KlController(**kl.controller.model_dump())


def kl_weight(kl: KlConfig | None, controller: KlController | None) -> float:
    """lambda_KL of the next update."""
    if controller is not None:
        return controller.weight
    return kl.weight if kl is not None else 0.0

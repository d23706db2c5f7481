"""The policy's learning rate and the weight of the KL penalty, which change from update to update."""

from __future__ import annotations

from euphonium.config import KlConfig, RunConfig
from euphonium.dynamics.kl import KlController
from learners.engine import schedule


def learning_rate(config: RunConfig, updates_done: int) -> float:
    """Learning rate of the next update: linear warm-up, then a decay over all updates of the run."""
    optimizer = config.optimizer
    total = config.iterations * config.objective.updates_per_iteration
    return schedule.learning_rate(
        optimizer.learning_rate, updates_done, total, optimizer.warmup_updates, optimizer.schedule
    )


def kl_controller(kl: KlConfig | None) -> KlController | None:
    """The controller of the KL penalty's weight in its initial state, or None if the recipe has none."""
    return None if kl is None or kl.controller is None else KlController(**kl.controller.model_dump())


def kl_weight(kl: KlConfig | None, controller: KlController | None) -> float:
    """lambda_KL of the next update."""
    if controller is not None:
        return controller.weight
    return kl.weight if kl is not None else 0.0

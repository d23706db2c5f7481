"""``euphonium train-orm``: trains an outcome reward model on preferences over videos, and prints its accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from euphonium.config import OrmConfig
from euphonium.locks import writing_alone
from euphonium.trained_prompts import write_trained_prompts
from learners.rewards.preference_files import open_preferences
from learners.rewards.worker import RESULT_FILE
from orchestrator.commands.paths import absolute_paths
from orchestrator.commands.reward_checks import check_orm
from orchestrator.commands.reward_group import cluster, run_training


def train_orm(config: OrmConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains an outcome reward model by a recipe, and writes it to ``config.target``.

    Args:
        config: the recipe.
        say: prints progress.

    Returns:
        Results on held-out preferences.

    Raises:
        ConfigError: preferences or backbone cannot be used.
        TrainingError: the group was lost for good, or the loss is not finite.
    """
    config = absolute_paths(config)
    with writing_alone([(config.run_dir, "output_dir"), (config.target, "target")]):
        return _train_alone(config, say)


def _train_alone(config: OrmConfig, say: Callable[[str], None]) -> dict[str, Any]:
    found = check_orm(config)
    for part in ("train", "held-out"):
        say(f"{part}: {found[part]}")
    with cluster(config):
        run_training("orm", config, say)
    training, _ = open_preferences(config.preferences, config.seed)
    write_trained_prompts(config.target, training.prompts)
    result: dict[str, Any] = json.loads((config.run_dir / RESULT_FILE).read_text())
    for name in ("accuracy", "label_accuracy", "calibration_error"):
        if name in result:
            say(f"held-out {name.replace('_', ' ')}: {result[name]:.1%}")
    say(f"wrote {config.target}: reward type trained with options {{ path: {config.target} }}")
    return result

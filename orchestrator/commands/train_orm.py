"""``euphonium train-orm``: trains an outcome reward model on preferences over videos, and prints its accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from euphonium.config import OrmConfig
from euphonium.locks import writing_alone
from learners.rewards.preference_files import open_preferences
from learners.rewards.worker import RESULT_FILE
from orchestrator.commands.paths import absolute_paths
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
    from euphonium.rewards.outcome_model import OutcomeModel

    OutcomeModel.from_backbone(config.model, device_map="meta")
    train, held_out = open_preferences(config.preferences, config.seed)
    for part, table in (("training", train), ("held-out", held_out)):
        labelled = int((table.label >= 0).sum())
        say(f"{part}: {len(table.files)} samples of {len(table.prompts)} prompts, {len(table.pairs)} pairs, "
            f"{len(table.ties)} ties, {labelled} labels")  # fmt: skip
    with cluster(config):
        run_training("orm", config, say)
    result: dict[str, Any] = json.loads((config.run_dir / RESULT_FILE).read_text())
    for name in ("accuracy", "label_accuracy", "calibration_error"):
        if name in result:
            say(f"held-out {name.replace('_', ' ')}: {result[name]:.1%}")
    say(f"wrote {config.target}: reward type trained with options {{ path: {config.target} }}")
    return result

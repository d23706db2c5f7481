"""``euphonium validate``: the checks of every command that takes a recipe, and the short form of its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from euphonium.config import OrmConfig, PrmConfig, RunConfig
from orchestrator.commands.paths import absolute_paths


def validated(
    config: RunConfig | PrmConfig | OrmConfig, recipe: Path
) -> tuple[RunConfig | PrmConfig | OrmConfig, dict[str, Any]]:
    """Checks a recipe; starts nothing.

    Args:
        config: the recipe.
        recipe: its file.

    Returns:
        The recipe with what the plan chooses for its ``auto``, and what it would do, as text by name.

    Raises:
        ConfigError: it cannot work, or does not fit GPUs of a stated size.
    """
    from orchestrator.commands.planning import plan_lines, settle, training_lines
    from orchestrator.plan.reward_choice import choose_drawn

    if isinstance(config, OrmConfig):
        from orchestrator.commands.reward_checks import check_orm

        absolute_orm = absolute_paths(config)
        found = check_orm(absolute_orm, downloads=False)
        return config, found | (training_lines(absolute_orm) if Path(config.model.path).exists() else {})
    from euphonium.generators.described import describe_generator

    if isinstance(config, PrmConfig):
        from orchestrator.commands.reward_checks import check_prm

        found = check_prm(absolute_paths(config), describe_generator(config.model))
        config = choose_drawn(config, config.gpu_memory_gib)
        return config, found | training_lines(config)
    from orchestrator.commands.launch import preflight

    absolute = absolute_paths(config)
    found = preflight(absolute, describe_generator(absolute.model))
    config = settle(config, recipe)
    return config, found | config.planned | plan_lines(absolute_paths(config), recipe)

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
    if isinstance(config, OrmConfig):
        from orchestrator.commands.reward_checks import check_orm

        return config, check_orm(absolute_paths(config), downloads=False)
    from euphonium.generators.described import describe_generator

    if isinstance(config, PrmConfig):
        from orchestrator.commands.reward_checks import check_prm

        return config, check_prm(absolute_paths(config), describe_generator(config.model))
    from orchestrator.commands.launch import preflight
    from orchestrator.commands.planning import plan_lines, settle

    absolute = absolute_paths(config)
    found = preflight(absolute, describe_generator(absolute.model))
    config = settle(config, recipe)
    return config, found | config.planned | plan_lines(absolute_paths(config), recipe)

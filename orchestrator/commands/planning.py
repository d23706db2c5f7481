"""``euphonium plan``, and its short form in ``euphonium validate``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from euphonium.config import RunConfig, load_config
from euphonium.errors import ConfigError
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.plan import Plan, blocks_of_prm, make_plan
from orchestrator.plan.table import assumptions, summary, table

log = logging.getLogger(__name__)


def print_plan(
    recipe: Path,
    overrides: Sequence[str],
    sizes: Mapping[str, float | None],
    assumed: Sequence[str],
    *,
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    """Plans a recipe and prints the plan.

    Args:
        recipe: the recipe.
        overrides: ``a.b=c`` settings that replace the recipe's.
        sizes: fields of :class:`orchestrator.plan.hardware.Hardware`; None keeps the default.
        assumed: further ones as ``name=value``.
        as_json: whether to print JSON.
        say: prints a line.

    Raises:
        ConfigError: it does not fit, or it cannot be planned.
    """
    config: RunConfig = load_config(recipe, overrides)
    given = {name: value for name, value in sizes.items() if value is not None} | _assumed(assumed)
    plan = _plan(config, recipe, given)
    if as_json:
        say(plan.as_json())
    else:
        say(table(plan))
        say("\n" + assumptions(plan))
    if plan.problems:
        raise ConfigError(_does_not_fit(plan))


def plan_lines(config: RunConfig, recipe: Path) -> dict[str, str]:
    """The plan of a recipe in a few lines by name; warns if it does not fit on GPUs whose size nobody stated.

    Raises:
        ConfigError: it does not fit on GPUs of ``pools.gpu_memory_gib``.
    """
    plan = _plan(config, recipe, {})
    if plan.problems:
        if config.pools.gpu_memory_gib is not None:
            raise ConfigError(_does_not_fit(plan))
        log.warning("%s (pools.gpu_memory_gib states what a GPU has)", _does_not_fit(plan))
    return summary(plan)


def _plan(config: RunConfig, recipe: Path, given: Mapping[str, Any]) -> Plan:
    stated = config.pools.gpu_memory_gib
    hardware = Hardware(**({"gpu_gib": stated} if stated is not None else {}) | dict(given))
    return make_plan(config, hardware, blocks_of_prm(config, recipe))


def _assumed(texts: Sequence[str]) -> dict[str, float]:
    known = [field.name for field in dataclasses.fields(Hardware) if field.name != "nodes"]
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--assume {text}: unknown; known are {', '.join(known)}")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--assume {text}: {value!r} is no number") from error
    return found


def _does_not_fit(plan: Plan) -> str:
    return "the plan does not fit:\n  " + "\n  ".join(plan.problems)

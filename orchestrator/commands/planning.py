"""``euphonium plan``, and its short form in ``euphonium validate``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from euphonium.config import RunConfig, load_config
from euphonium.errors import ConfigError
from orchestrator.plan.choice import as_recorded, choose
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.plan import Plan, blocks_of_prm, make_plan
from orchestrator.plan.table import assumptions, summary, table

if TYPE_CHECKING:
    from orchestrator.state.checkpoints import Checkpoint

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
    given = {name: value for name, value in sizes.items() if value is not None} | _assumed(assumed)
    config: RunConfig = settle(load_config(recipe, overrides), recipe, given.get("gpu_gib"))
    plan = _plan(config, recipe, given)
    if as_json:
        say(plan.as_json())
    else:
        say(table(plan))
        say("\n" + assumptions(plan))
    if plan.problems:
        raise ConfigError(_does_not_fit(plan))


def settle(config: RunConfig, recipe: Path | None, gpu_gib: float | None = None) -> RunConfig:
    """The recipe with what the plan chooses for all of its ``auto`` (orchestrator/plan/choice.py).

    Args:
        config: the recipe.
        recipe: its file; None where the process reward model is there, whose recipe need not be looked for.
        gpu_gib: memory of a GPU; None takes the recipe's.
    """
    known = config.pools.gpu_memory_gib if gpu_gib is None else gpu_gib
    return choose(config, known, lambda: blocks_of_prm(config, recipe))


def settle_run(config: RunConfig, checkpoint: Checkpoint | None) -> RunConfig:
    """The recipe of a run that begins: what is ``auto`` is as the run had it, or chosen now.

    Args:
        config: the recipe.
        checkpoint: what the run is resumed from.
    """
    if checkpoint is not None:
        config = as_recorded(config, checkpoint.recipe())
    return settle(config, None)


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

"""``euphonium plan``, and its short form in ``euphonium validate``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from euphonium.config import OrmConfig, PrmConfig, RunConfig, dump_config, load_any_config
from euphonium.errors import ConfigError
from euphonium.files import written_aside
from orchestrator.groups.prompts import read_prompts
from orchestrator.plan.choice import as_recorded, choose
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.plan import Plan, blocks_of_prm, make_plan
from orchestrator.plan.reward_choice import choose_drawn
from orchestrator.plan.reward_plan import RewardPlan, plan_orm, plan_prm, reward_summary, reward_table
from orchestrator.plan.table import assumptions, summary, table
from orchestrator.state.checkpoints import RESOLVED

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
    config = load_any_config(recipe, overrides)
    plan: Plan | RewardPlan
    if isinstance(config, RunConfig):
        plan = _plan(settle(config, recipe, given.get("gpu_gib")), recipe, given)
        text = table(plan)
    else:
        plan = plan_of_training(config, given)
        text = reward_table(plan)
    if as_json:
        say(plan.as_json())
    else:
        say(text)
        say("\n" + assumptions(plan.hardware))
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
    _refuse_or_warn(plan, config.pools.gpu_memory_gib, "pools.gpu_memory_gib")
    return summary(plan)


def training_lines(config: PrmConfig | OrmConfig) -> dict[str, str]:
    """The plan of a reward model's training in a few lines by name; warns as :func:`plan_lines`.

    Raises:
        ConfigError: it does not fit on GPUs of ``gpu_memory_gib``, or its backbone is not here.
    """
    plan = plan_of_training(config, {})
    _refuse_or_warn(plan, config.gpu_memory_gib, "gpu_memory_gib")
    return plan.planned | reward_summary(plan)


def plan_of_training(config: PrmConfig | OrmConfig, given: Mapping[str, Any]) -> RewardPlan:
    """The plan of a reward model's training.

    Args:
        config: the recipe.
        given: what is assumed of the machines, by the fields of :class:`Hardware`.

    Raises:
        ConfigError: it cannot be planned.
    """
    hardware = _hardware(config.gpu_memory_gib, given)
    if isinstance(config, OrmConfig):
        return plan_orm(config, hardware)
    config = choose_drawn(config, given.get("gpu_gib", config.gpu_memory_gib))
    return plan_prm(config, hardware, _numbers_of_prompts(config))


def settle_training(config: PrmConfig) -> PrmConfig:
    """The recipe of a training that begins or goes on: what is ``auto`` is as the training had it, or chosen now.

    What is chosen is recorded in the training's folder.
    """
    file = config.run_dir / RESOLVED
    if file.is_file():
        config = as_recorded(config, file.read_text(encoding="utf-8"))
    config = choose_drawn(config, config.gpu_memory_gib)
    if config.planned:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as aside:
            aside.write_text(dump_config(config), encoding="utf-8")
    return config


def _numbers_of_prompts(config: PrmConfig) -> dict[str, int] | None:
    if config.prompts is None or not (config.prompts.train.is_file() and config.prompts.evaluation.is_file()):
        return None
    files = {"train": config.prompts.train, "evaluation": config.prompts.evaluation}
    return {part: len(read_prompts(file, f"prompts.{part}")) for part, file in files.items()}


def _plan(config: RunConfig, recipe: Path, given: Mapping[str, Any]) -> Plan:
    return make_plan(config, _hardware(config.pools.gpu_memory_gib, given), blocks_of_prm(config, recipe))


def _hardware(stated: float | None, given: Mapping[str, Any]) -> Hardware:
    return Hardware(**({"gpu_gib": stated} if stated is not None else {}) | dict(given))


def _refuse_or_warn(plan: Plan | RewardPlan, stated: float | None, field: str) -> None:
    if plan.problems:
        if stated is not None:
            raise ConfigError(_does_not_fit(plan))
        log.warning("%s (%s states what a GPU has)", _does_not_fit(plan), field)


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


def _does_not_fit(plan: Plan | RewardPlan) -> str:
    return "the plan does not fit:\n  " + "\n  ".join(plan.problems)

"""The noise levels that a diffusers pipeline walks, taken from its own scheduler.

diffusers computes them: the class that ``scheduler/scheduler_config.json`` names is built from that file and told what
the pipeline's ``__call__`` tells it. Only what our samplers need otherwise is changed here: they compute in float64,
and begin at pure noise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from euphonium.config import NoiseGridConfig
from euphonium.dynamics import shifted_sigmas
from euphonium.dynamics.laws import checked_grid
from euphonium.errors import ConfigError
from euphonium.generators.folder import ComponentConfig, PipelineFolder

SCHEDULER, SCHEDULER_FILE = "scheduler", "scheduler_config.json"
# Of the classes of diffusers, the one that counts the end of a walk among its steps.
COUNTS_END = "MiniMaxH3Scheduler"
# Schedulers compute in float32; UniPC begins a millionth below 1, because it takes the logarithm of what is left.
ROUNDING = 2e-6


class NoiseGrid(NamedTuple):
    """The noise levels of a walk.

    Attributes:
        sigmas: float64 ``[num_steps + 1]``, noise fractions, falling from 1 to 0.
        times: float64 ``[num_steps]``, the network's time input as a fraction of its range, where the pipeline gives it
            another than ``sigmas[:-1]``; else None.
    """

    sigmas: Tensor
    times: Tensor | None = None


def scheduler_config(pipeline: PipelineFolder) -> ComponentConfig:
    """Configuration of a pipeline's scheduler; raises ConfigError if the file is missing or damaged."""
    return pipeline.component_config(SCHEDULER, SCHEDULER_FILE)


def evenly_told(pipeline: PipelineFolder, num_steps: int) -> NDArray[np.float64] | None:
    """Levels from 1 to 1 / T, which pipelines of images tell their schedulers; None where the scheduler has its own."""
    if scheduler_config(pipeline).get("use_flow_sigmas"):
        return None
    return np.linspace(1.0, 1 / num_steps, num_steps)


def pipeline_grid(
    pipeline: PipelineFolder,
    num_steps: int,
    settings: NoiseGridConfig,
    *,
    told: NDArray[np.float64] | None = None,
    tokens: int | None = None,
    mu: float | None = None,
) -> NoiseGrid:
    """The noise levels of a flow-matching pipeline's scheduler.

    Args:
        pipeline: the pipeline.
        num_steps: number of sampling steps T.
        settings: whose shift, if it has one, replaces the scheduler's own.
        told: noise levels ``[num_steps]`` before the shift that the pipeline tells its scheduler, or None.
        tokens: tokens of a sample, of which pipelines compute a shift that depends on the size; None if they do not.
        mu: the logarithm of such a shift where the pipeline computes it in another way.

    Raises:
        ConfigError: the scheduler is not one of flow matching, or cannot make this grid.
    """
    config, section = scheduler_config(pipeline), settings.section
    name, multistep = config.get("_class_name"), bool(config.get("use_flow_sigmas"))
    where = f"{SCHEDULER}/{SCHEDULER_FILE} of {pipeline.path}"
    remedy = f"set {section}.grid: linear and {section}.shift"
    if name not in ("FlowMatchEulerDiscreteScheduler", COUNTS_END) and not multistep:
        raise ConfigError(
            f"{section}.grid: pipeline takes the noise levels of the pipeline's scheduler, and {where} names a {name}, "
            f"which has none of flow matching; {remedy}"
        )
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic and settings.shift is not None:
        raise ConfigError(
            f"{section}.shift: this pipeline computes its shift from the size ({where}: use_dynamic_shifting); set "
            f"{section}.shift to null, or {section}.grid to linear, which takes it"
        )
    field = "flow_shift" if multistep else "shift"
    try:
        scheduler = _scheduler(str(name), config if settings.shift is None else config | {field: settings.shift})
        arguments: dict[str, Any] = {"num_inference_steps": num_steps + (name == COUNTS_END)}
        if told is not None:
            arguments["sigmas"] = told
        if dynamic and (mu is not None or tokens is not None):
            arguments["mu"] = _shift_of_size(scheduler, tokens or 0) if mu is None else mu
        scheduler.set_timesteps(**arguments)
        return _as_walked(scheduler, num_steps, None if dynamic else float(scheduler.config[field]))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{section}.grid: the {name} of {where} makes no noise levels for {num_steps} steps ({error}); {remedy}"
        ) from error


def _scheduler(name: str, config: ComponentConfig) -> Any:
    import diffusers

    return getattr(diffusers, name).from_config(config)


def _shift_of_size(scheduler: Any, tokens: int) -> float:
    """The pipelines' own function of the number of tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    mu: float = calculate_shift(
        tokens, config["base_image_seq_len"], config["max_image_seq_len"], config["base_shift"], config["max_shift"]
    )
    return mu


def _as_walked(scheduler: Any, num_steps: int, shift: float | None) -> NoiseGrid:
    """The scheduler's levels as our samplers take them; raises StepTableError, a ValueError, if they do not fall."""
    sigmas: Tensor = scheduler.sigmas.double()
    if shift is not None:
        # diffusers rounds to float32: where the levels are those of the linear grid, they are taken unrounded.
        linear = shifted_sigmas(num_steps, shift)
        if sigmas.shape == linear.shape and bool(((sigmas - linear).abs() <= ROUNDING).all()):
            sigmas = linear
    if abs(float(sigmas[0]) - 1) <= ROUNDING:
        # Laws tell pure noise from nearly pure noise, whose variance is nearly infinite.
        sigmas = torch.cat([torch.ones(1, dtype=torch.float64), sigmas[1:]])
    times: Tensor = scheduler.timesteps
    whole = not times.is_floating_point()
    sigmas = checked_grid(sigmas)
    return NoiseGrid(sigmas, times.double() / float(scheduler.config["num_train_timesteps"]) if whole else None)

"""What ``euphonium train`` does before it starts anything: checks, and the run's folder."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from euphonium.config import RunConfig, dump_config
from euphonium.errors import CheckpointError, ConfigError
from orchestrator.report.tracking import METRICS_FILE, read_metrics
from orchestrator.state.checkpoints import Checkpoint, CheckpointStore, verify

if TYPE_CHECKING:
    from euphonium.generators.generator import Generator

log = logging.getLogger(__name__)

RESOLVED = "config.resolved.yaml"


def preflight(config: RunConfig, family: Generator | None = None) -> dict[str, Any]:
    """Checks everything that can be checked without starting anything.

    Args:
        config: the recipe.
        family: its generator, where it is open already; else it is opened, and downloaded if need be.

    Returns:
        The plan of the run, as text by name.

    Raises:
        ConfigError: the run cannot work; names the field, and what to do.
    """
    from actors.sampler import select_steps
    from euphonium.generators.generator import images_for
    from euphonium.generators.registry import open_generator
    from euphonium.rewards.registry import build_rewards
    from orchestrator.evaluation import evaluation_set
    from orchestrator.groups.prompts import read_prompts

    family = open_generator(config.model) if family is None else family
    shape = family.latent_shape
    prompts = read_prompts(config.prompts.train, "prompts.train")
    evaluation_set(config)
    images_for(family, config.prompts)
    build_rewards(config.rewards.outcome)
    if config.rewards.process is not None:
        from euphonium.rewards.process import ProcessRewardModel

        ProcessRewardModel.load(Path(config.rewards.process.path), config.model)
    table = family.step_table(config.sampler)
    kept = select_steps(table, 1, config.objective.timestep_fraction, 0).shape[1]
    rollout, pools, process = config.rollout, config.pools, config.rewards.process
    refreshes = process is not None and process.refresh is not None
    samples = rollout.prompts_per_iteration * rollout.group_size
    values = 1
    for size in shape:
        values *= size
    return {
        "generator": f"{family.pipeline_class} at {family.folder}",
        "latents": "x".join(map(str, shape)),
        "training prompts": len(prompts),
        "samples per iteration": f"{rollout.prompts_per_iteration} prompts x {rollout.group_size} = {samples}",
        "sampler": f"{config.sampler.law}, {table.num_steps} steps, stochastic {_ranges(table.stochastic_steps)}, "
        f"guided {_ranges(table.guided_steps) or 'none'}",
        "trained transitions per iteration": samples * kept,
        "trajectory bytes per iteration": samples * kept * values * 8,
        "rollout actors": f"{pools.rollout.num_actors} x {pools.rollout.num_gpus:g} GPU",
        "PRM servers": f"{pools.prm.num_actors} x {pools.prm.num_gpus:g} GPU" if process else "none",
        "PRM refresh": f"1 x {pools.refresh_pool.num_gpus:g} GPU" if refreshes else "none",
        "ORM servers": f"{pools.orm.num_actors} x {pools.orm.num_gpus:g} GPU",
        "learner ranks": f"{pools.learner.num_workers} x {pools.learner.num_gpus:g} GPU",
    }


def _ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def prepare_run_dir(config: RunConfig) -> Checkpoint | None:
    """Creates the run's folder, or finds the checkpoint that an earlier run in it is resumed from.

    Nothing is ever overwritten: with ``resume: never`` an old folder is moved aside.

    Raises:
        CheckpointError: there is an earlier run, but all of its checkpoints are damaged.
        ConfigError: the checkpoint belongs to another run.
    """
    folder, resume = config.run_dir, config.resume
    checkpoint = None
    if isinstance(resume, Path):
        if not resume.is_dir():
            raise ConfigError(f"resume: {resume} is neither 'auto' nor 'never' nor the folder of a checkpoint")
        checkpoint = verify(resume.resolve())
    elif folder.exists() and any(folder.iterdir()):
        store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep_last)
        metrics = folder / METRICS_FILE
        began = metrics.exists() and metrics.stat().st_size > 0
        if resume == "never" or (began and not store.folders()):
            # A run that was killed before its first checkpoint has nothing to go on from, and starts anew.
            aside = folder.with_name(f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}")
            folder.rename(aside)
            log.warning("moved the earlier run %s aside to %s", folder, aside)
        else:
            checkpoint = store.newest()
            if checkpoint is None and began:
                raise CheckpointError(
                    f"{folder} holds an earlier run, but all its checkpoints are damaged; take another name=..., or "
                    "resume=never to move it aside"
                )
    if checkpoint is not None:
        _check_same_run(checkpoint, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(dump_config(config))
    return checkpoint


def is_complete(config: RunConfig, checkpoint: Checkpoint) -> bool:
    """Whether a resumed run has nothing left to do: it is trained, evaluated and exported."""
    done = checkpoint.state.iteration
    if done != config.iterations:
        return done > config.iterations
    evaluated = any(
        r["iteration"] == done and "eval/total/mean" in r for r in read_metrics(config.run_dir / METRICS_FILE)
    )
    return evaluated and (config.run_dir / "export").is_dir()


def _check_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    old = yaml.safe_load((checkpoint.folder / "config.yaml").read_text())
    new = config.model_dump(mode="json")
    for part in ("model", "seed"):
        if old.get(part) != new[part]:
            raise ConfigError(
                f"resume: {checkpoint.folder} is of a run with {part}: {old.get(part)}, this one has {new[part]}; "
                "take another name=... for another run"
            )
    for part in sorted(set(new) - {"name", "output_dir", "resume"}):
        if old.get(part) != new[part]:
            log.warning("resuming with other settings in %s: %s -> %s", part, old.get(part), new[part])

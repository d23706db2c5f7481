"""What ``euphonium train`` does before it starts anything: checks, and the run's folder."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from euphonium.config import ModelConfig, MovingWindowConfig, NoiseGridConfig, PromptsConfig, RunConfig, dump_config
from euphonium.config.foreign import ineffective_variables
from euphonium.errors import CheckpointError, ConfigError
from euphonium.files import written_aside
from euphonium.locks import refuse_unwritable
from euphonium.text_files import quoted
from orchestrator.report.trackers import check_trackers
from orchestrator.report.tracking import METRICS_FILE, read_metrics
from orchestrator.state.checkpoints import RESOLVED, Checkpoint, CheckpointStore, verify

if TYPE_CHECKING:
    from euphonium.dynamics import StepTable
    from euphonium.generators.generator import Generator

log = logging.getLogger(__name__)


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
    from actors.training_rows import stored_states, trained_steps
    from euphonium.generators.components import check_generator
    from euphonium.generators.feature_cache import check_feature_cache
    from euphonium.generators.libraries import import_networks
    from euphonium.generators.pictures import check_pictures
    from euphonium.generators.registry import open_generator
    from euphonium.generators.sequence import check_sequence_parallel
    from euphonium.rewards.registry import build_rewards
    from learners.engine.options import check_options
    from orchestrator.evaluation import evaluation_set
    from orchestrator.groups.prompts import read_prompts

    refuse_ineffective_variables()
    refuse_unwritable(config.run_dir, "output_dir")
    prompts = read_prompts(config.prompts.train, "prompts.train")
    evaluation_set(config)
    build_rewards(config.rewards.outcome)
    check_options(config.pools.learner)
    check_trackers(config.metrics.trackers)
    # From here on models may be downloaded: what is quickly looked at comes before.
    described = family is not None and not Path(config.model.path).exists()
    family = open_generator(config.model) if family is None else family
    if not described:
        import_networks()
        check_generator(family)
    check_sequence_parallel(family, config.pools.learner.sequence_parallel)
    check_feature_cache(family, config.reuse_fields)
    starts = {}
    if config.start_from is not None:
        from learners.policy.start import check_start

        starts["starts from"] = check_start(config.start_from, family)
    shape = family.latent_shape
    check_pictures(family, config.prompts)
    prepared = check_prompts(config.prompts, family, weights=not described)
    if config.rewards.process is not None:
        from euphonium.rewards.process import ProcessRewardModel

        ProcessRewardModel.check(Path(config.rewards.process.path), config.model)
    table = family.step_table(config.sampler.of_group())
    kept = trained_steps(config, table, 0)
    steps, states = kept.shape[1], stored_states(config, table, kept)[1]
    best_of, size = config.advantage.best_of, config.rollout.group_size
    trained = size if best_of is None else min(size, 2 * best_of)
    rollout, pools, process = config.rollout, config.pools, config.rewards.process
    refreshes = process is not None and process.refresh is not None
    samples = rollout.prompts_per_iteration * rollout.group_size
    values = 1
    for size in shape:
        values *= size
    return {
        "generator": f"{family.pipeline_class} at {family.folder}",
        **starts,
        "latents": "x".join(map(str, shape)),
        "training prompts": len(prompts),
        **prepared,
        "samples per iteration": f"{rollout.prompts_per_iteration} prompts x {rollout.group_size} = {samples}",
        "sampler": f"{config.sampler.law}, {table.num_steps} steps, stochastic {_stochastic(config, table)}, "
        f"guided {_ranges(table.guided_steps) or 'none'}",
        "trained transitions per iteration": rollout.prompts_per_iteration * trained * steps,
        **_learning(config),
        "trajectory bytes per iteration": rollout.prompts_per_iteration * states * values * 4,
        "rollout actors": f"{pools.rollout.num_actors} x {pools.rollout.num_gpus:g} GPU",
        "PRM servers": f"{pools.prm.num_actors} x {pools.prm.num_gpus:g} GPU" if process else "none",
        "PRM refresh": f"1 x {pools.refresh_pool.num_gpus:g} GPU" if refreshes else "none",
        "ORM servers": f"{pools.orm.num_actors} x {pools.orm.num_gpus:g} GPU",
        "learner ranks": f"{pools.learner.num_workers} x {pools.learner.num_gpus:g} GPU{_sharing(config)}",
        **_adapter_plan(config, family),
        **({} if config.objective.noises_samples else _untrained_guidance(family.step_table(config.sampler))),
        **_warm_up_alone(config),
        **prompts_of_reward_models(config),
    }


def check_prompts(prompts: PromptsConfig, family: Generator, *, weights: bool) -> dict[str, str]:
    """Checks a recipe's prompts against what encodes them: warns of those that are cut, refuses what is not prepared.

    Args:
        prompts: the recipe's prompts.
        family: its generator.
        weights: whether the generator's weights are here.

    Returns:
        What there is to say, as text by name.

    Raises:
        ConfigError: prompts are lacking among ``prompts.embeddings``, or were encoded by others.
    """
    from euphonium.generators.embeddings import check_embeddings
    from euphonium.generators.prompt_length import warn_of_cut_prompts
    from orchestrator.groups.prompts import read_prompts

    files = [prompts.train, prompts.evaluation]
    texts = [text for file, field in zip(files, ("train", "evaluation"), strict=True)
             for text in read_prompts(file, f"prompts.{field}")]  # fmt: skip
    found = {}
    if prompts.embeddings is not None:
        found["text encoders"] = check_embeddings(prompts.embeddings, family, texts, files=files, weights=weights)
    return found | warn_of_cut_prompts(family, texts)


def _sharing(config: RunConfig) -> str:
    """How many ranks share a sample, in words; empty if each has its own."""
    ranks = config.pools.learner.sequence_parallel
    return f", of which {ranks} share every sample's tokens" if ranks > 1 else ""


def _learning(config: RunConfig) -> dict[str, str]:
    """Which of the trained transitions the learner does not compute, and when it begins, in words."""
    skipped, begins = "those of samples whose advantage is 0", "with the first groups, while the others are drawn"
    if config.objective.trains_zero_advantages:
        skipped = "none: the objective has another term, which has a gradient also where the advantage is 0"
    if reason := config.waits_for_all_groups:
        begins = f"when all groups of an iteration are there ({reason})"
    return {"without a pass of the network": skipped, "the learner begins": begins}


def _untrained_guidance(table: StepTable) -> dict[str, str]:
    """The steps whose guidance reaches the samples but not the policy; nothing if there are none.

    Only steps with noise have a likelihood, and can be trained.
    """
    untrained = sorted(set(table.guided_steps) - set(table.stochastic_steps))
    if not untrained:
        return {}
    strength = table.coef_grad.abs()
    share = float(strength[untrained].sum() / strength.sum())
    text = (
        f"{_ranges(untrained)} ({share:.0%} of the guidance): without noise there, the policy never learns it; end "
        "sampler.guidance.window with sampler.sde_window"
    )
    log.warning("guided steps that are not trained: %s", text)
    return {"guided but not trained": text}


def prompts_of_reward_models(config: RunConfig) -> dict[str, str]:
    """A run's prompts that its reward models were trained on, which rank their samples too well; nothing if none."""
    from euphonium.trained_prompts import trained_among
    from orchestrator.groups.prompts import read_prompts

    folders = [Path(str(r.options["path"])) for r in config.rewards.outcome if r.type == "trained"]
    if config.rewards.process is not None:
        folders.append(Path(config.rewards.process.path))
    found = []
    for folder in folders:
        for what, file in (("training", config.prompts.train), ("held-out", config.prompts.evaluation)):
            prompts = read_prompts(file, f"prompts.{what}")
            if shared := trained_among(folder, prompts):
                found.append(f"{len(shared)} of {len(prompts)} {what} prompts, such as {quoted(shared[0])} ({folder})")
    if not found:
        return {}
    text = f"reward models were trained on {'; '.join(found)}; hold a run's prompts out of their training"
    log.warning("prompts: %s", text)
    return {"prompts of reward models": text}


def _stochastic(config: RunConfig, table: StepTable) -> str:
    """The steps with noise; of windows that are drawn for every group, how many there are and where."""
    window, moving = config.sampler.window(0), config.sampler.sde_window
    if isinstance(moving, MovingWindowConfig) and moving.kind == "group" and window is not None:
        return f"{moving.size} of {_ranges(list(range(*window)))}, drawn for every group"
    return _ranges(table.stochastic_steps) or "none"


def _warm_up_alone(config: RunConfig) -> dict[str, str]:
    """A KL controller with feedback that never leaves its warm-up, so that it never acts; nothing if it does."""
    kl = config.objective.kl
    updates = config.iterations * config.objective.updates_per_iteration
    if kl is None or kl.controller is None or kl.controller.target is None:
        return {}
    if kl.controller.warmup_updates < updates:
        return {}
    text = (
        f"all {updates} updates of the run are warm-up (objective.kl.controller.warmup_updates: "
        f"{kl.controller.warmup_updates}): its feedback never acts; raise iterations, or lower warmup_updates"
    )
    log.warning("KL controller: %s", text)
    return {"KL controller": text}


def _adapter_plan(config: RunConfig, family: Generator) -> dict[str, str]:
    """How the adapter of a run can be exported; nothing without one."""
    from orchestrator.export_policy import adapter_pipeline

    if config.model.lora is None:
        return {}
    try:
        adapter_pipeline(family)
    except ConfigError as error:
        return {"adapter": f"exported added into the weights only ({error})"}
    return {"adapter": "exported added into the weights, or alone (export --adapter)"}


def refuse_ineffective_variables() -> None:
    """Checks that the environment sets nothing that other projects read from it, and this one does not.

    Raises:
        ConfigError: it does; says what each is called in a recipe.
    """
    ineffective = ineffective_variables(os.environ)
    if ineffective:
        raise ConfigError(
            "the environment configures nothing here; unset these and put them into the recipe or an override:\n  "
            + "\n  ".join(ineffective)
        )


def _ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        checkpoint: what it is resumed from, or None.
        moves_aside: whether the folder of an earlier run is in its place, and is moved aside first.
    """

    checkpoint: Checkpoint | None
    moves_aside: bool = False


def plan_start(config: RunConfig) -> Start:
    """Finds out how a run begins; changes nothing.

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
            return Start(None, moves_aside=True)
        checkpoint = store.newest()
        if checkpoint is None and began:
            raise CheckpointError(
                f"{folder} holds an earlier run, but all its checkpoints are damaged; take another name=..., or "
                "resume=never to move it aside"
            )
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    return Start(checkpoint)


def prepare_run_dir(config: RunConfig, start: Start) -> None:
    """Creates the run's folder; nothing is ever overwritten, an old one is moved aside where the plan says so."""
    folder = config.run_dir
    if start.moves_aside:
        aside = folder.with_name(f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        log.warning("moved the earlier run %s aside to %s", folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / RESOLVED) as file:
        file.write_text(dump_config(config), encoding="utf-8")


def is_complete(config: RunConfig, checkpoint: Checkpoint) -> bool:
    """Whether a resumed run has nothing left to do: it is trained, evaluated and exported."""
    done = checkpoint.state.iteration
    if done != config.iterations:
        return done > config.iterations
    metrics = config.run_dir / METRICS_FILE
    records = read_metrics(metrics) if metrics.is_file() else []
    evaluated = any(record["iteration"] == done and "time/evaluation_s" in record for record in records)
    return evaluated and (config.run_dir / "export").is_dir()


def check_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Checks that a checkpoint is of the same run, and warns of settings that have changed.

    Raises:
        ConfigError: it is of another run.
    """
    from orchestrator.plan.choice import as_recorded

    old = yaml.safe_load(checkpoint.recipe())
    config = as_recorded(config, checkpoint.recipe())
    new = config.model_dump(mode="json")
    # A run from before a field came in has its default.
    unset = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    old["model"] = unset | old["model"]
    for part in ("model", "seed"):
        if old.get(part) != new[part]:
            raise ConfigError(
                f"resume: {checkpoint.folder} is of a run with {part}: {old.get(part)}, this one has {new[part]}; "
                "take another name=... for another run"
            )
    _refuse_what_the_checkpoint_lacks(checkpoint, old, config)
    _refuse_another_walk(checkpoint, old, config)
    for part in sorted(set(new) - {"name", "output_dir", "resume", "planned"}):
        if old.get(part) != new[part]:
            log.warning("resuming with other settings in %s: %s -> %s", part, old.get(part), new[part])


def _refuse_another_walk(checkpoint: Checkpoint, old: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses to train a policy on other noise levels than before because a recipe or its defaults have changed."""
    from euphonium.generators.registry import open_generator

    sampler, fields = config.sampler, NoiseGridConfig.model_fields
    before = NoiseGridConfig.model_validate({name: old["sampler"][name] for name in fields if name in old["sampler"]})
    if (before.grid, before.shift) == (sampler.grid, sampler.shift):
        return
    family = open_generator(config.model)
    then, now = (family.ode_table(sampler.num_steps, grid).fingerprint() for grid in (before, sampler))
    if then != now:
        kept = f"sampler.grid={before.grid} sampler.shift={'null' if before.shift is None else before.shift}"
        raise ConfigError(
            f"sampler.grid and sampler.shift: {checkpoint.folder} is of a run with other noise levels; set {kept} to "
            "go on with them, or begin a run with another name=..."
        )


def _refuse_what_the_checkpoint_lacks(checkpoint: Checkpoint, old: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses what has to be there from a run's first iteration on, and so is in no checkpoint of a run without it."""
    kl, old_kl = config.objective.kl, old["objective"].get("kl") or {}
    if config.optimizer.averages and not old["optimizer"]["ema_decay"]:
        field, lacks = "optimizer.ema_decay", "moving average of the weights"
    elif kl is not None and kl.anchor != "none" and old_kl.get("anchor", "none") == "none":
        field, lacks = "objective.kl.anchor", "policy from before training, which this KL penalty measures from"
    else:
        return
    raise ConfigError(
        f"{field}: {checkpoint.folder} is of a run that began without it, and holds no {lacks}; leave the field as it "
        "was, or begin a run with another name=..."
    )

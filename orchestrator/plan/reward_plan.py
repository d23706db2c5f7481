"""Plans of ``train-prm`` and ``train-orm``: memory of every process, what is drawn and kept on disk, and seconds."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from euphonium.config import OrmConfig, PrmConfig, TrainingGroupConfig
from euphonium.config.base import chosen
from orchestrator.plan.fit import MemoryOf, RoleFit, largest
from orchestrator.plan.hardware import GB, Hardware
from orchestrator.plan.memory import RoleMemory
from orchestrator.plan.meter import Cost
from orchestrator.plan.networks import NetworkPasses, prompt_bytes
from orchestrator.plan.outcome_passes import OutcomePasses
from orchestrator.plan.reward_memory import Trained, drawing_memory, encoding_memory, training_memory
from orchestrator.plan.table import WIDTH, duration, items
from orchestrator.plan.workload import FLOAT32

PETA = 1e15
PAIRS_FIELD, DRAWN_FIELD = "optimizer.pairs_per_micro_batch", "pairs.samples_per_pass"


@dataclass(frozen=True, kw_only=True)
class RewardPlan:
    """A plan of the training of a reward model.

    Attributes:
        name: name of the training.
        model: what is trained in a few words.
        hardware: what was assumed of the machines.
        processes: that train, and draw before.
        fits: memory by what is done: encoding of prompts, drawing, training.
        samples: samples that are drawn; None if none are, or the prompts are not here to be counted.
        disk_bytes: latents and encoded prompts on disk.
        petaflops: operations by what is done, in 1e15.
        seconds: time by what is done, all processes together.
        problems: what does not fit, each with the field to change.
        planned: what the plan chose where the recipe says ``auto``, by field.
    """

    name: str
    model: str
    hardware: Hardware
    processes: int
    fits: list[RoleFit]
    samples: int | None = None
    disk_bytes: float = 0.0
    petaflops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    planned: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """The plan for programs."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def plan_prm(config: PrmConfig, hardware: Hardware, prompts: Mapping[str, int] | None = None) -> RewardPlan:
    """Plans the training of a process reward model.

    Args:
        config: the recipe.
        hardware: what is assumed of the machines.
        prompts: numbers of prompts by part (``train``, ``evaluation``); None if they are not here.

    Raises:
        ConfigError: the generator is not described, or a number is ``auto`` and not yet chosen.
    """
    passes = NetworkPasses(config.model, config.blocks)
    pairs = config.optimizer.pairs_per_micro_batch
    of_pairs = passes.training_step(saving=config.gradient_checkpointing)
    width = passes.generator.dtype.itemsize

    def training_of(count: int) -> RoleMemory:
        size = dataclasses.replace(passes.prm_size, trained=passes.prm_size.parameters)
        trained = Trained(size=size, width=width, pairs=count, step=of_pairs(count))
        return training_memory(trained, config.learner, config.optimizer)

    plan = _training(config, hardware, training_of, of_pairs(pairs), passes.generator.dtype, passes.prm_size.parameters)
    plan = dataclasses.replace(
        plan,
        model=f"process reward model of {config.blocks} blocks, {passes.prm_size.said} parameters, "
        f"{config.model.dtype}, latents {'x'.join(map(str, passes.generator.latent_shape))}",
    )
    return plan if config.preferences is not None else _drawn(plan, config, passes, prompts)


def plan_orm(config: OrmConfig, hardware: Hardware) -> RewardPlan:
    """Plans the training of an outcome reward model.

    Raises:
        ConfigError: the backbone is not here.
    """
    passes = OutcomePasses(config)

    def training_of(count: int) -> RoleMemory:
        trained = Trained(size=passes.size, width=passes.dtype.itemsize, pairs=count, step=passes.step(count))
        return training_memory(trained, config.learner, config.optimizer)

    pairs = config.optimizer.pairs_per_micro_batch
    plan = _training(config, hardware, training_of, passes.step(pairs), passes.dtype, passes.size.parameters)
    what = f"outcome reward model, {passes.size.said} parameters, {config.model.dtype}"
    return dataclasses.replace(plan, model=f"{what}, {config.model.frames} frames")


def _training(
    config: PrmConfig | OrmConfig, hardware: Hardware, memory_of: MemoryOf, step: Cost, dtype: torch.dtype, size: int
) -> RewardPlan:
    """The plan of the training alone."""
    settings, learner = config.optimizer, config.learner
    processes = _processes(learner)
    pairs = settings.pairs_per_micro_batch
    share = settings.pairs_per_update / processes
    passes = settings.updates * -(-share // pairs)
    moved = 3 * FLOAT32 * size * (1 - 1 / processes)
    seconds = passes * (
        hardware.seconds(step, dtype) + (1 - hardware.zero_overlap) * hardware.collective_s(moved, processes)
    )
    memory = memory_of(pairs)
    advice = _advice(
        PAIRS_FIELD, pairs, memory_of, hardware, "training", "set gradient_checkpointing: true, or more ranks"
    )
    return RewardPlan(
        name=config.name, model="", hardware=hardware, processes=processes,
        fits=[_fit("training", processes, memory, hardware)],
        petaflops={"training": settings.updates * settings.pairs_per_update * step.flops / pairs / PETA},
        seconds={"training": seconds}, problems=[advice] if advice else [], planned=dict(config.planned),
    )  # fmt: skip


def _drawn(plan: RewardPlan, config: PrmConfig, passes: NetworkPasses, prompts: Mapping[str, int] | None) -> RewardPlan:
    """The plan with the drawing of samples before the training."""
    hardware, pairs = plan.hardware, config.pairs
    at_once = chosen(pairs.samples_per_pass, DRAWN_FIELD)
    advice = _advice(
        DRAWN_FIELD, at_once, lambda n: drawing_memory(passes, config, n), hardware, "drawing",
        "take larger GPUs, or set model.vae_tiling: true",
    )  # fmt: skip
    fits = [
        _fit("encoding", 1, encoding_memory(passes, config), hardware),
        _fit("drawing", plan.processes, drawing_memory(passes, config, at_once), hardware),
        *plan.fits,
    ]
    found = dataclasses.replace(plan, fits=fits, problems=[*plan.problems, *([advice] if advice else [])])
    if prompts is None:
        return found
    samples = prompts["train"] * pairs.samples_per_prompt + prompts["evaluation"] * pairs.held_out_samples_per_prompt
    velocity, decoding = passes.velocity(at_once), passes.decode(1)
    flops = pairs.num_steps * velocity.flops / at_once + decoding.flops
    each = pairs.num_steps * hardware.seconds(velocity, passes.generator.dtype) / at_once
    each += hardware.seconds(decoding, passes.vae.dtype)
    return dataclasses.replace(
        found,
        samples=samples,
        disk_bytes=samples * passes.latent_bytes + sum(prompts.values()) * prompt_bytes(passes.generator),
        petaflops={"drawing": samples * flops / PETA} | plan.petaflops,
        seconds={"drawing": samples * each / plan.processes} | plan.seconds,
    )


def _processes(learner: TrainingGroupConfig | None) -> int:
    return 1 if learner is None else learner.num_workers


def _fit(role: str, members: int, memory: RoleMemory, hardware: Hardware) -> RoleFit:
    return RoleFit(role, members, memory, memory.gpu_gib(hardware), memory.host_gib(hardware))


def _advice(field_name: str, size: int, memory_of: MemoryOf, hardware: Hardware, what: str, last_resort: str) -> str:
    """What does not fit and the field that changes it; empty if it fits."""
    memory = memory_of(size)
    if memory.fits(hardware):
        return ""
    fitting = largest(memory_of, size, hardware)
    remedy = f"{fitting} fits" if fitting else f"no number fits: {last_resort}"
    return (
        f"{field_name}: {size}: {what} needs {memory.gpu_gib(hardware):.1f} GiB of the {hardware.gpu_gib:g}; {remedy}"
    )


# --- as text -------------------------------------------------------------------------------------------------------


def reward_table(plan: RewardPlan) -> str:
    """The whole plan, at most 100 columns wide."""
    lines = [f"{plan.name}: {plan.model}", *(f"{name}: {note}" for name, note in plan.planned.items()), ""]
    lines.append(f"{'memory':<14}{'members':>7}{'GPU GiB':>9}{'host GiB':>10}  of which")
    table = []
    for fit in plan.fits:
        gpu = f"{fit.gpu_gib:.1f}" if fit.gpu_gib else "-"
        begin = f"{fit.role:<14}{fit.members:>7}{gpu:>9}{fit.host_gib:>10.1f}  "
        table += textwrap.wrap(items(fit), WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin))
    work = [f"{name}: {text}" for name, text in reward_summary(plan).items() if not name.startswith("GiB")]
    verdict = [f"does not fit: {problem}" for problem in plan.problems] or ["it fits"]
    wrapped = [
        line for long in (*lines, *table, "", *work, "", *verdict)
        for line in (textwrap.wrap(long, WIDTH, subsequent_indent="  ", drop_whitespace=False) or [""])
    ]  # fmt: skip
    return "\n".join(line.rstrip() for line in wrapped)


def reward_summary(plan: RewardPlan) -> dict[str, str]:
    """The plan in a few lines by name, for ``euphonium validate``."""
    lines = {}
    if any(fit.gpu_gib for fit in plan.fits):
        lines["GiB of a GPU"] = ", ".join(f"{fit.role} {fit.gpu_gib:.1f}" for fit in plan.fits)
    if plan.samples is not None:
        lines["samples that are drawn"] = f"{plan.samples}, {plan.disk_bytes / GB:.3g} GB on disk"
    lines["PFLOP"] = ", ".join(f"{what} {amount:.4g}" for what, amount in plan.petaflops.items())
    if any(fit.gpu_gib for fit in plan.fits):
        times = ", ".join(f"{what} {duration(seconds)}" for what, seconds in plan.seconds.items())
        lines["estimated time"] = f"{times} on {plan.processes} GPU{'s' if plan.processes > 1 else ''}"
    return lines

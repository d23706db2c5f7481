"""A plan: what a recipe needs and how long its iterations take, put together from the parts of this package."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from euphonium.config import PrmConfig, RunConfig, load_config
from euphonium.errors import ConfigError
from orchestrator.plan.fit import RoleFit, fits_of, smallest_learner
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.memory import publication_bytes
from orchestrator.plan.nodes import NodeUse, Objects, place
from orchestrator.plan.passes import Passes
from orchestrator.plan.sharing import SharedGpu, fullest_gpu, gpus_filled, sharing_advice
from orchestrator.plan.timing import IterationTime, Split, best_split, iteration_time, refresh_cost, speeds, turns_time
from orchestrator.plan.workload import PassSizes, Workload, workload_of

PETA = 1e15
PRM_RECIPE = "prm.yaml"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's plan.

    Attributes:
        name: name of the run.
        model: the generator in a few words.
        hardware: what was assumed of the machines.
        fits: memory by role.
        shared: the fullest GPU that processes share; None if none do.
        nodes: memory by node.
        work: what an iteration consists of.
        petaflops: operations of an iteration by role, in 1e15.
        evaluation_petaflops: operations of an evaluation's sampling.
        publication_bytes: bytes of the weights of one publication.
        split: sizes of the pools; None where a member has no GPU or several, which is not timed.
        time: seconds of an iteration with them.
        best: the split of the same number of GPUs with the shortest iteration; None where GPUs are shared.
        best_time: seconds of an iteration with it.
        problems: what does not fit, each with the field to change.
        planned: what the plan chose where the recipe says ``auto``, by field.
    """

    name: str
    model: str
    hardware: Hardware
    fits: list[RoleFit]
    shared: SharedGpu | None
    nodes: list[NodeUse]
    work: Workload
    petaflops: dict[str, float]
    evaluation_petaflops: float
    publication_bytes: int
    split: Split | None
    time: IterationTime | None
    best: Split | None
    best_time: IterationTime | None
    problems: list[str]
    planned: dict[str, str]

    @property
    def gpus(self) -> int:
        """GPUs that the pools fill."""
        return gpus_filled(self.fits)

    def as_json(self) -> str:
        """The plan for programs."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["gpus"] = self.gpus
        return json.dumps(values, indent=2)


def make_plan(config: RunConfig, hardware: Hardware, prm_blocks: int | None = None) -> Plan:
    """Plans a recipe; takes seconds, at most a minute for the largest models.

    Args:
        config: the recipe.
        hardware: what is assumed of the machines.
        prm_blocks: blocks of the process reward model (:func:`blocks_of_prm`).

    Raises:
        ConfigError: the generator is not described, or does not support the recipe, or a number is ``auto``
            (:mod:`orchestrator.plan.choice`).
    """
    if config.rewards.process is not None and prm_blocks is None:
        raise ConfigError("rewards.process: a plan needs the number of blocks of the process reward model")
    passes = Passes(config, prm_blocks if config.rewards.process is not None else None)
    sizes, work = PassSizes.of(config), workload_of(config, passes.generator)
    fits = fits_of(passes, sizes, hardware)
    overlapped = config.rollout.max_staleness > 0
    shared = fullest_gpu(fits, hardware, overlapped=overlapped)
    crowded = sharing_advice(shared, fits, hardware, sleeps=config.pools.rollout.sleep)
    objects = Objects(
        iteration=work.iteration_bytes,
        publication=publication_bytes(passes),
        kinds=2 if config.optimizer.averages else 1,
        ahead=config.rollout.max_staleness,
        groups_of_actor=work.iteration_bytes / config.pools.rollout.num_actors,
    )
    nodes = place(fits, objects, hardware)
    split = _split(fits)
    timed: tuple[IterationTime | None, Split | None, IterationTime | None] = (None, None, None)
    if split is not None:
        timed = _timed(passes, sizes, work, hardware, split, shared=shared is not None)
    network = passes.network_size
    return Plan(
        name=config.name,
        model=(
            f"{passes.generator.pipeline_class}, {network.said} parameters, {config.model.dtype}, "
            f"latents {'x'.join(map(str, passes.generator.latent_shape))}"
        ),
        hardware=hardware,
        fits=fits,
        shared=shared,
        nodes=nodes,
        work=work,
        petaflops=_petaflops(passes, sizes, work),
        evaluation_petaflops=work.evaluation_velocities * passes.velocity(sizes.evaluation).flops
        / sizes.evaluation / PETA,
        publication_bytes=publication_bytes(passes),
        split=split,
        time=timed[0],
        best=timed[1],
        best_time=timed[2],
        problems=[advice for advice in (*(fit.advice for fit in fits), crowded) if advice]
        + _node_problems(fits, nodes, hardware),
        planned=dict(config.planned),
    )  # fmt: skip


def blocks_of_prm(config: RunConfig, recipe: Path | None) -> int | None:
    """Blocks of a recipe's process reward model: of the trained one, or of the recipe that would train it.

    Args:
        config: the recipe.
        recipe: its file, beside which that of the process reward model is looked for; None looks for none.

    Raises:
        ConfigError: there is neither.
    """
    process = config.rewards.process
    if process is None:
        return None
    described = Path(process.path) / "prm.json"
    if described.is_file():
        return int(json.loads(described.read_text())["blocks"])
    training = recipe.parent / PRM_RECIPE if recipe is not None else None
    if training is not None and training.is_file():
        return load_config(training, (), PrmConfig).blocks
    raise ConfigError(
        f"rewards.process.path: {process.path} holds no process reward model, and there is no "
        f"{training or PRM_RECIPE} to plan it by; train one with `euphonium train-prm`"
    )


def _split(fits: list[RoleFit]) -> Split | None:
    pools = [fit for fit in fits if fit.role != "prm_refresh"]
    if any(not 0 < fit.memory.gpu_share <= 1 for fit in pools):
        return None
    members = {fit.role: fit.members for fit in pools}
    return Split(**{"prm": 0} | members)


def _timed(
    passes: Passes, sizes: PassSizes, work: Workload, hardware: Hardware, split: Split, *, shared: bool
) -> tuple[IterationTime, Split | None, IterationTime | None]:
    """Time with the recipe's pools, the best split, and its time."""
    speed = speeds(passes, sizes, work, hardware)
    overlapped = passes.config.rollout.max_staleness > 0
    streamed = not passes.config.waits_for_all_groups
    if shared:
        return turns_time(speed, work, split, hardware), None, None

    def time_of(candidate: Split) -> IterationTime:
        return iteration_time(speed, work, candidate, hardware, overlapped=overlapped, streamed=streamed)

    ranks = smallest_learner(passes, sizes, hardware)
    best = best_split(
        split.total, with_prm=split.prm > 0, smallest_learner=ranks or split.learner, sharing=sizes.sharing,
        time_of=lambda candidate: time_of(candidate).total,
    )  # fmt: skip
    return time_of(split), best, time_of(best) if best is not None else None


def _petaflops(passes: Passes, sizes: PassSizes, work: Workload) -> dict[str, float]:
    learner = passes.micro_step(sizes.learner).flops
    if work.references:
        learner += work.references * passes.velocity(sizes.learner).flops
    found = {
        "rollout": work.samples * work.velocity_steps * passes.velocity(sizes.rollout).flops / sizes.rollout,
        "orm": work.samples * work.decodes * passes.decode(sizes.decode).flops / sizes.decode,
        "learner": work.groups * work.states * learner / sizes.learner,
    }
    if passes.prm_blocks is not None:
        gradient, score = (f(sizes.prm).flops / sizes.prm for f in (passes.gradient, passes.score))
        if sizes.refresh:
            found["prm_refresh"] = work.refreshed_pairs * refresh_cost(passes, sizes).flops / sizes.refresh
        found["prm"] = work.samples * (work.guided * gradient + work.scored * score)
    return {role: flops / PETA for role, flops in found.items()}


def _node_problems(fits: list[RoleFit], nodes: list[NodeUse], hardware: Hardware) -> list[str]:
    problems = []
    gpus = gpus_filled(fits)
    if hardware.nodes is not None and gpus > hardware.nodes * hardware.gpus_per_node:
        problems.append(
            f"pools: they take {gpus} GPUs, and {hardware.nodes} nodes of {hardware.gpus_per_node} have "
            f"{hardware.nodes * hardware.gpus_per_node}; make them smaller"
        )
    fullest = max(nodes, key=lambda node: node.host_gib)
    if fullest.host_gib > hardware.host_gib:
        held = ", ".join(f"{count} {role}" for role, count in fullest.members.items())
        problems.append(
            f"a node with {held} needs {fullest.host_gib:.0f} GiB of host memory of its {hardware.host_gib:g}; spread "
            "the pools over more nodes, or turn off pools.learner.offload_optimizer"
        )
    store = max(node.store_gib for node in nodes)
    if store > hardware.store_gib:
        problems.append(
            f"an object store holds {store:.0f} GiB of the {hardware.store_gib:.0f} that Ray gives it on nodes of "
            f"{hardware.host_gib:g} GiB; lower rollout.prompts_per_iteration, or give it more (ray start "
            f"--object-store-memory)"
        )
    return problems

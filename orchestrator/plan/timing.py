"""Seconds of an iteration, by role, and the split of the GPUs that makes it shortest.

Speeds are taken for granted (:class:`orchestrator.plan.hardware.Hardware`); nothing here was timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.plan.hardware import GB, Hardware
from orchestrator.plan.memory import computes_in, frozen_copies, publication_bytes
from orchestrator.plan.meter import Cost
from orchestrator.plan.passes import Passes
from orchestrator.plan.workload import PassSizes, Workload


@dataclass(frozen=True, kw_only=True)
class Split:
    """Members of every pool; each has a GPU of its own where a plan is timed."""

    rollout: int
    prm: int
    orm: int
    learner: int

    @property
    def total(self) -> int:
        """All members."""
        return self.rollout + self.prm + self.orm + self.learner

    def __str__(self) -> str:
        prm = f", {self.prm} PRM" if self.prm else ""
        return f"{self.rollout} rollout{prm}, {self.orm} ORM, {self.learner} learner"


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What one GPU takes for the passes of an iteration, in seconds, and the bytes that it moves.

    Attributes:
        velocity: a step of a group.
        gradient: process rewards and gradients of a group's states; 0 without a PRM.
        score: process rewards of a group's states.
        decode: decoding of one sample.
        micro_step: a micro-batch of the learner with all forward passes of references.
        update: work of the optimizer on host memory, a rank of one.
        refresh: the process reward model's refresh, on average over the iterations.
        zero_bytes: bytes of weights and gradients that a micro-batch moves.
        whole_bytes: bytes of whole weights that are gathered after an update.
        iteration_bytes: trajectories of an iteration.
        publication_bytes: new weights.
        rows: transitions of a micro-batch.
        sharing: ranks of the learner that share a micro-batch; its seconds are those of each.
        exchanged_bytes: bytes of tokens that each of them receives for a micro-batch.
    """

    velocity: float
    gradient: float
    score: float
    decode: float
    micro_step: float
    update: float
    refresh: float
    zero_bytes: float
    whole_bytes: float
    iteration_bytes: float
    publication_bytes: float
    rows: int
    sharing: int
    exchanged_bytes: float


@dataclass(frozen=True, kw_only=True)
class IterationTime:
    """Seconds of an iteration; ``busy`` is what each pool computes, evenly spread over its members.

    Attributes:
        rollout: drawing all groups, with waits for process rewards.
        scoring: what outcome rewards take after the last group is drawn.
        fetch: the learner's fetch of the trajectories.
        update: the updates.
        exposed: of these, waits for ZeRO-3's collectives, and for tokens of ranks that share samples.
        refresh: the process reward model's refresh, on average.
        publish: new weights, from the learner to the last rollout actor.
        total: the iteration.
        busy: seconds that each role's GPUs compute.
    """

    rollout: float
    scoring: float
    fetch: float
    update: float
    exposed: float
    refresh: float
    publish: float
    total: float
    busy: dict[str, float]


def speeds(passes: Passes, sizes: PassSizes, work: Workload, hardware: Hardware) -> Speeds:
    """Speeds of a recipe's passes."""

    def seconds(role: str, cost: Cost, times: float) -> float:
        return hardware.seconds(cost, computes_in(passes, role)) * times

    group, pool, size = work.group_size, passes.config.pools.learner, passes.network_size
    width = passes.generator.dtype.itemsize
    micro = seconds("learner", passes.micro_step(sizes.learner), 1 / sizes.sharing)
    forward = seconds("learner", passes.velocity(sizes.learner), 1 / sizes.sharing) if work.references else 0.0
    gathered = (size.parameters - size.kept_whole(whole_weights=sizes.whole_weights)) * width
    # Frozen copies are shared in any case; adapters and replay use the policy's own weights.
    reference = size.weight_bytes if frozen_copies(passes) else gathered
    refresh = 0.0
    if sizes.refresh:
        refresh = seconds("prm", refresh_cost(passes, sizes), work.refreshed_pairs / sizes.refresh)
    return Speeds(
        velocity=seconds("rollout", passes.velocity(sizes.rollout), group / sizes.rollout),
        gradient=seconds("prm", passes.gradient(sizes.prm), group / sizes.prm) if work.guided else 0.0,
        score=seconds("prm", passes.score(sizes.prm), group / sizes.prm) if work.scored else 0.0,
        decode=seconds("orm", passes.decode(sizes.decode), 1 / sizes.decode),
        micro_step=micro + work.references * forward,
        update=hardware.host_adam_s * size.trained / GB / pool.threads if pool.offload_optimizer else 0.0,
        refresh=refresh,
        zero_bytes=2 * gathered + work.references * reference + size.trained * width,
        whole_bytes=size.weight_bytes - gathered,
        iteration_bytes=work.iteration_bytes,
        publication_bytes=publication_bytes(passes),
        rows=sizes.learner,
        sharing=sizes.sharing,
        exchanged_bytes=exchanged_bytes(passes, sizes, work) if sizes.sharing > 1 else 0.0,
    )


def exchanged_bytes(passes: Passes, sizes: PassSizes, work: Workload) -> float:
    """Bytes of tokens that each of the ranks that share a micro-batch receives: a block's queries, keys, values and
    outputs, in every pass.
    """
    generator, config = passes.generator, passes.config
    tokens = sizes.learner * sum(generator.shared_tokens().values()) * (1 if config.model.cfg_scale is None else 2)
    blocks = sum(int(generator.transformer_config()[field]) for field in generator.block_fields)
    each = tokens * generator.token_width() * generator.dtype.itemsize / sizes.sharing
    times = 2 + config.pools.learner.gradient_checkpointing + work.references
    return 4 * blocks * times * each * (1 - 1 / sizes.sharing)


def refresh_cost(passes: Passes, sizes: PassSizes) -> Cost:
    """A micro-batch of the process reward model's refresh."""
    process = passes.config.rewards.process
    assert process is not None
    assert process.refresh is not None
    return passes.training_step(saving=process.refresh.gradient_checkpointing)(sizes.refresh)


def iteration_time(
    speed: Speeds, work: Workload, split: Split, hardware: Hardware, *, overlapped: bool, streamed: bool = False
) -> IterationTime:
    """Seconds of an iteration with pools of these sizes.

    Args:
        speed: what the passes take.
        work: what an iteration consists of.
        split: sizes of the pools.
        hardware: speeds of transfers.
        overlapped: whether rollouts go on while the learner trains (``rollout.max_staleness`` above 0).
        streamed: whether the learner begins with an iteration's first groups while the others are drawn.
    """
    asking = split.rollout / split.prm if split.prm else 0.0
    group = (
        work.guided * max(speed.velocity, asking * speed.gradient)
        + work.scored * max(speed.velocity, asking * speed.score)
        + max(0.0, work.velocity_steps - work.guided - work.scored) * speed.velocity
    )
    waves = -(-work.groups // split.rollout)
    rollout = work.tail(split.rollout).waves * group
    decoding = work.samples * work.decodes * speed.decode / split.orm
    last = work.groups - (waves - 1) * split.rollout
    # Earlier waves are scored while the next one is drawn.
    scoring = max(decoding * last / work.groups, decoding - max(0.0, rollout - group))
    batches = work.micro_batches(speed.rows, split.learner // speed.sharing)
    moved = speed.zero_bytes * (1 - 1 / split.learner)
    exposed = batches * (1 - hardware.zero_overlap) * hardware.collective_s(moved, split.learner)
    exposed += batches * hardware.collective_s(speed.exchanged_bytes, speed.sharing)
    exposed += work.updates * hardware.collective_s(speed.whole_bytes * (1 - 1 / split.learner), split.learner)
    update = batches * speed.micro_step + exposed + work.updates * speed.update / split.learner
    # Every rank trains on a part of every group.
    fetch = speed.iteration_bytes / (hardware.store_gbs * GB)
    receiving = hardware.nodes_for(split.rollout)
    publish = speed.publication_bytes * (1 / (hardware.publish_gbs * GB) + receiving / (hardware.store_gbs * GB))
    sampling, learning = rollout + scoring, fetch + update + speed.refresh
    total = sampling + learning
    if overlapped:
        total = max(sampling, learning)
    elif streamed:
        # What the first update has of the groups follows them wave by wave; further ones need its weights.
        first = (fetch + update) / work.updates
        total += max(sampling + first / waves, sampling / waves + first) - sampling - first
    total += publish
    steps = work.groups / split.rollout
    return IterationTime(
        rollout=rollout, scoring=scoring, fetch=fetch, update=update, exposed=exposed,
        refresh=speed.refresh, publish=publish, total=total,
        busy={
            "rollout": steps * work.velocity_steps * speed.velocity,
            "prm": asking * steps * (work.guided * speed.gradient + work.scored * speed.score),
            "prm_refresh": speed.refresh,
            "orm": decoding,
            "learner": batches * speed.micro_step,
        },
    )  # fmt: skip


def turns_time(speed: Speeds, work: Workload, split: Split, hardware: Hardware) -> IterationTime:
    """Seconds of an iteration whose roles share their GPUs: nothing runs beside anything else, and each role is as fast
    as its members alone.

    Args:
        speed: what the passes take.
        work: what an iteration consists of.
        split: sizes of the pools.
        hardware: speeds of transfers.
    """
    apart = iteration_time(speed, work, split, hardware, overlapped=False)
    asking = split.rollout / split.prm if split.prm else 0.0
    rewards = asking * (work.guided * speed.gradient + work.scored * speed.score)
    group, scoring = work.velocity_steps * speed.velocity + rewards, apart.busy["orm"]
    rollout = work.tail(split.rollout).waves * group
    total = rollout + scoring + apart.fetch + apart.update + apart.refresh + apart.publish
    return dataclasses.replace(apart, rollout=rollout, scoring=scoring, total=total)


def best_split(
    total: int, *, with_prm: bool, smallest_learner: int, sharing: int, time_of: Callable[[Split], float]
) -> Split | None:
    """The split of ``total`` GPUs with the shortest iteration; None if they are too few for all roles.

    Args:
        total: GPUs.
        with_prm: whether there are PRM servers.
        smallest_learner: ranks that the learner needs for its memory.
        sharing: ranks of the learner that share a sample.
        time_of: seconds of an iteration.
    """

    def splits() -> Iterator[Split]:
        for learner in range(smallest_learner, total, sharing):
            for orm in range(1, total - learner):
                for prm in range(1, total - learner - orm) if with_prm else (0,):
                    yield Split(rollout=total - learner - orm - prm, prm=prm, orm=orm, learner=learner)

    return min(splits(), key=time_of, default=None)

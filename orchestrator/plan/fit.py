"""What does not fit, and the field that would change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from euphonium.generators.sequence import ranks_that_share
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.memory import (
    COUNTED,
    RoleMemory,
    learner_memory,
    orm_memory,
    prm_memory,
    refresh_memory,
    rollout_memory,
)
from orchestrator.plan.passes import Passes
from orchestrator.plan.workload import SHARD_FIELD, SIZE_FIELDS, PassSizes, replaced


@dataclass(frozen=True)
class RoleFit:
    """One role's memory, and how large a pass may be.

    Attributes:
        role: name of the pool.
        members: processes of the pool.
        memory: memory of each.
        gpu_gib: GiB that a GPU of the pool needs.
        host_gib: GiB of host memory of each process.
        advice: what does not fit and what to change; empty if it fits.
    """

    role: str
    members: int
    memory: RoleMemory
    gpu_gib: float
    host_gib: float
    advice: str = ""


# Memory of a role as a function of the size of its pass.
MemoryOf = Callable[[int], RoleMemory]


def largest(memory_of: MemoryOf, size: int, hardware: Hardware) -> int:
    """Largest pass up to ``size`` that fits on a GPU, 0 if none does; the memory of passes grows evenly."""
    if memory_of(size).fits(hardware):
        return size
    one, two = memory_of(1), memory_of(2)
    if not one.fits(hardware):
        return 0
    room, each = hardware.gpu_gib - one.gpu_gib(hardware), two.gpu_gib(hardware) - one.gpu_gib(hardware)
    fitting = 1 + int(room / max(each, 1e-9))
    if one.largest:
        fitting = min(fitting, int((COUNTED - 1) / one.largest))
    return max(1, min(size - 1, fitting))


def fits_of(passes: Passes, sizes: PassSizes, hardware: Hardware) -> list[RoleFit]:
    """Memory of all roles of a recipe, in the order in which work passes them, and what to change if it is too much."""
    advice = {
        "rollout": _rollout_advice, "prm": _prm_advice, "prm_refresh": _refresh_advice, "orm": _orm_advice,
        "learner": _learner_advice,
    }  # fmt: skip
    return [
        replace(fit, advice=advice[fit.role](passes, sizes, hardware)) for fit in members_of(passes, sizes, hardware)
    ]


def members_of(passes: Passes, sizes: PassSizes, hardware: Hardware) -> list[RoleFit]:
    """Memory of all roles of a recipe, in the order in which work passes them."""
    pools = passes.config.pools
    ranks = pools.learner.num_workers
    found = {"rollout": (pools.rollout.num_actors, rollout_memory(passes, sizes))}
    if passes.prm_blocks is not None:
        found["prm"] = pools.prm.num_actors, prm_memory(passes, sizes)
    if sizes.refresh:
        found["prm_refresh"] = 1, refresh_memory(passes, sizes)
    found["orm"] = pools.orm.num_actors, orm_memory(passes, sizes)
    found["learner"] = ranks, learner_memory(passes, sizes, ranks)
    return [
        RoleFit(role, members, memory, memory.gpu_gib(hardware), memory.host_gib(hardware))
        for role, (members, memory) in found.items()
    ]


def _rollout_advice(passes: Passes, sizes: PassSizes, hardware: Hardware) -> str:
    def memory_of(samples: int) -> RoleMemory:
        return rollout_memory(passes, replaced(sizes, rollout=samples, evaluation=min(samples, sizes.evaluation)))

    return _pass_advice(
        SIZE_FIELDS["rollout"], sizes.rollout, "a rollout actor", memory_of, hardware,
        last_resort="take larger GPUs, or a smaller model.height, model.width or model.frames",
    )  # fmt: skip


def _prm_advice(passes: Passes, sizes: PassSizes, hardware: Hardware) -> str:
    return _pass_advice(
        SIZE_FIELDS["prm"], sizes.prm, "a PRM server", lambda n: prm_memory(passes, replaced(sizes, prm=n)),
        hardware, last_resort="take larger GPUs, or a process reward model of fewer blocks",
    )  # fmt: skip


def _refresh_advice(passes: Passes, sizes: PassSizes, hardware: Hardware) -> str:
    process = passes.config.rewards.process
    saving = process is not None and process.refresh is not None and process.refresh.gradient_checkpointing
    return _pass_advice(
        SIZE_FIELDS["refresh"], sizes.refresh, "the actor of the refresh",
        lambda n: refresh_memory(passes, replaced(sizes, refresh=n)), hardware,
        last_resort="take larger GPUs" if saving else "set rewards.process.refresh.gradient_checkpointing: true",
    )  # fmt: skip


def _orm_advice(passes: Passes, sizes: PassSizes, hardware: Hardware) -> str:
    return _pass_advice(
        SIZE_FIELDS["decode"], sizes.decode, "an ORM server", lambda n: orm_memory(passes, replaced(sizes, decode=n)),
        hardware, last_resort="set model.vae_tiling: true",
    )  # fmt: skip


def _pass_advice(field: str, size: int, who: str, memory_of: MemoryOf, hardware: Hardware, *, last_resort: str) -> str:
    memory = memory_of(size)
    if memory.fits(hardware):
        return ""
    needed = memory.gpu_gib(hardware)
    fitting = largest(memory_of, size, hardware)
    remedy = f"{fitting} fits" if fitting else f"no number fits: {last_resort}"
    if needed <= hardware.gpu_gib:
        return (
            f"{field}: {size} makes tensors of {memory.largest:.2g} elements, and convolutions count to 2^31; {remedy}"
        )
    return f"{field}: {size} needs {needed:.1f} GiB of the {hardware.gpu_gib:g} on {who}; {remedy}"


def _learner_advice(passes: Passes, sizes: PassSizes, hardware: Hardware) -> str:
    ranks = passes.config.pools.learner.num_workers
    needed = learner_memory(passes, sizes, ranks).gpu_gib(hardware)
    if needed <= hardware.gpu_gib:
        return ""
    begin = f"a rank of the learner needs {needed:.1f} GiB of the {hardware.gpu_gib:g}"
    rows = largest(lambda n: learner_memory(passes, replaced(sizes, learner=n), ranks), sizes.learner, hardware)
    if rows:
        return f"{SIZE_FIELDS['learner']}: {sizes.learner}: {begin}; {rows} fits"
    if sizes.whole_weights and learner_memory(passes, replaced(sizes, learner=1, whole_weights=False), ranks).fits(
        hardware
    ):
        return f"{SHARD_FIELD}: optimizer: {begin} with one row; full fits"
    if not passes.config.pools.learner.gradient_checkpointing:
        return f"pools.learner.gradient_checkpointing: {begin} with one row; set it to true"
    shares = {s: replaced(sizes, learner=1, sharing=s) for s in ranks_that_share(passes.generator)}
    enough = smallest_learner(passes, replaced(sizes, learner=1), hardware)
    if enough is not None:
        able = [s for s, one in shares.items() if ranks % s == 0 and learner_memory(passes, one, ranks).fits(hardware)]
        instead = f", or these with pools.learner.sequence_parallel: {able[0]}" if able else ""
        return f"pools.learner.num_workers: {ranks}: {begin} with one row; {enough} ranks fit{instead}"
    enough_of = {share: smallest_learner(passes, one, hardware) for share, one in shares.items()}
    if fitting := [(enough, share) for share, enough in enough_of.items() if enough is not None]:
        enough, share = min(fitting)
        return (
            f"pools.learner.sequence_parallel: {sizes.sharing}: {begin} with one row, and with any number of ranks; "
            f"set it to {share}, and num_workers to {enough}"
        )
    return (
        f"pools.learner: {begin} with one row, and with any number of ranks; set offload_optimizer: true, or train "
        "adapters (model.lora)"
    )


def smallest_learner(passes: Passes, sizes: PassSizes, hardware: Hardware) -> int | None:
    """Fewest ranks whose memory suffices; None if no number does."""
    for ranks in range(sizes.sharing, 257, sizes.sharing):
        if learner_memory(passes, sizes, ranks).gpu_gib(hardware) <= hardware.gpu_gib:
            return ranks
    return None

"""GPUs that processes of several roles share: who may meet on one, and what they need together.

Ray puts a process on the GPU with the least free share that suffices. The learner's ranks come first, each on a GPU of
its own; of the others any may meet whose shares fit, in whatever order they start. They take turns: while groups are
drawn and scored the ranks hold their states alone, while the learner works the others hold their weights alone, but for
those that sleep, and so they do while the process reward model is refreshed. With staleness all may work at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.plan.fit import RoleFit
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.memory import TEXT_ENCODERS

# Ray counts ten-thousandths of a GPU.
SMALLEST_SHARE = 1e-4
LEARNER, REFRESH, SAMPLING = "learner", "prm_refresh", "sampling"


@dataclass(frozen=True, kw_only=True)
class SharedGpu:
    """What the fullest GPU holds that several processes share.

    Attributes:
        members: processes by role.
        sampling_gib: GiB while groups are drawn and scored.
        learning_gib: GiB while the learner works.
        refreshing_gib: GiB while the process reward model is refreshed; 0 without its actor.
    """

    members: dict[str, int]
    sampling_gib: float
    learning_gib: float
    refreshing_gib: float = 0.0

    @property
    def needed_gib(self) -> float:
        """The most of all."""
        return max(self.sampling_gib, self.learning_gib, self.refreshing_gib)

    @property
    def roles(self) -> str:
        """The members in words."""
        return ", ".join(f"{count} {role}" for role, count in self.members.items())


def gpus_filled(fits: Sequence[RoleFit]) -> int:
    """GPUs that the members take when Ray places them: the learner's ranks first, then the largest shares."""
    free: list[float] = []
    for fit in sorted(fits, key=lambda fit: (fit.role != LEARNER, -fit.memory.gpu_share)):
        share = fit.memory.gpu_share
        for _ in range(fit.members if share else 0):
            room = [i for i, left in enumerate(free) if left >= share - SMALLEST_SHARE / 2]
            if share >= 1 or not room:
                free += [0.0] * math.floor(share) if share >= 1 else [1 - share]
            else:
                free[min(room, key=lambda i: free[i])] -= share
    return len(free)


def fullest_gpu(fits: Sequence[RoleFit], hardware: Hardware, *, overlapped: bool) -> SharedGpu | None:
    """The GPU that needs most of all that may come about; None if no process shares its GPU.

    Args:
        fits: memory by role.
        hardware: what is assumed of the machines.
        overlapped: whether rollouts go on while the learner works.
    """
    sharing = {fit.role: fit for fit in fits if 0 < fit.memory.gpu_share < 1}
    if not sharing:
        return None
    everywhere = LEARNER in sharing and gpus_filled(fits) == sharing[LEARNER].members

    def needs(members: Mapping[str, int]) -> SharedGpu:
        alone = LEARNER not in members and REFRESH not in members
        held = dict.fromkeys((SAMPLING, LEARNER, REFRESH), 0.0)
        for role, count in members.items():
            memory = sharing[role].memory
            working, resting = memory.gpu_gib(hardware), memory.resting_gib(hardware)
            own = role if role in held else SAMPLING
            for phase in held:
                held[phase] += count * (working if phase == own or overlapped or alone else resting)
        return SharedGpu(
            members=dict(members), sampling_gib=held[SAMPLING], learning_gib=held[LEARNER],
            refreshing_gib=held[REFRESH] if REFRESH in members else 0.0,
        )  # fmt: skip

    met = (needs(members) for members in _companies(sharing) if LEARNER in members or not everywhere)
    return max(met, key=lambda gpu: gpu.needed_gib)


def _companies(sharing: Mapping[str, RoleFit]) -> Iterator[dict[str, int]]:
    """All that may meet on one GPU: numbers of processes by role, zeros left out."""
    shares = {role: fit.memory.gpu_share for role, fit in sharing.items()}
    most = [min(fit.members, int((1 + SMALLEST_SHARE) / shares[role])) for role, fit in sharing.items()]
    for counts in itertools.product(*(range(n + 1) for n in most)):
        taken = sum(count * share for count, share in zip(counts, shares.values(), strict=True))
        if any(counts) and taken <= 1 + SMALLEST_SHARE / 2:
            yield {role: count for role, count in zip(shares, counts, strict=True) if count}


def sharing_advice(gpu: SharedGpu | None, fits: Sequence[RoleFit], hardware: Hardware, *, sleeps: bool) -> str:
    """What does not fit on the fullest GPU, and what to change; empty if it fits.

    Args:
        gpu: the GPU.
        fits: memory by role.
        hardware: what is assumed of the machines.
        sleeps: whether rollout actors sleep while the learner works.
    """
    if gpu is None or gpu.needed_gib <= hardware.gpu_gib:
        return ""
    learning = gpu.learning_gib > hardware.gpu_gib
    when = "while the learner works" if learning else "while groups are drawn and scored"
    if gpu.refreshing_gib == gpu.needed_gib:
        return (
            f"pools: a GPU that {gpu.roles} share needs {gpu.needed_gib:.1f} GiB of the {hardware.gpu_gib:g} while the "
            "process reward model is refreshed; give pools.prm_refresh a GPU of its own (num_gpus: 1)"
        )
    if learning and not sleeps and "rollout" in gpu.members:
        remedy = "set pools.rollout.sleep: true"
    elif not learning and "rollout" in gpu.members and _encodes_there(fits):
        remedy = "set pools.rollout.encode_on_cpu: true, or let fewer of them share it (num_gpus)"
    else:
        remedy = "let fewer of them share it (num_gpus), take more ranks, or set pools.learner.offload_optimizer: true"
    needed = f"needs {gpu.needed_gib:.1f} GiB of the {hardware.gpu_gib:g} {when}"
    return f"pools: a GPU that {gpu.roles} share {needed}; {remedy}"


def _encodes_there(fits: Sequence[RoleFit]) -> bool:
    """Whether text encoders are on the GPUs of rollout actors."""
    items = next(fit.memory.items for fit in fits if fit.role == "rollout")
    return any(item.name == TEXT_ENCODERS and not item.on_host for item in items)

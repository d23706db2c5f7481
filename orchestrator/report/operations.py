"""Floating-point operations a second that the policy's network achieves, from the plan's count of them.

Where all GPUs of the cluster are of one kind whose peak is known, also their share of it (MFU).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.wire.records import GroupInfo

log = logging.getLogger(__name__)

TERA, PETA = 1e12, 1e15
# Peak TFLOP/s in bfloat16 without sparsity, by Ray's names of accelerators, from their maker's data sheets. Ray calls
# several variants H100: this is the one with SXM.
PEAKS = {
    "A100": 312.0, "A100-40G": 312.0, "A100-80G": 312.0, "H100": 989.0, "H200": 989.0, "H20": 148.0, "B200": 2250.0,
    "L4": 121.0, "L40S": 362.0, "A10G": 70.0,
}  # fmt: skip


def gpu_types() -> set[str]:
    """Kinds of GPUs on the cluster's nodes, by Ray's names."""
    import ray

    return {
        node["Labels"].get("ray.io/accelerator-type", "unknown")
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    }


class Operations:
    """Turns an iteration's seconds into rates; counting takes up to a minute, on a thread, and no rate is known before.

    Args:
        config: configuration of the run; without ``profile.operations`` nothing is counted.
        types: tells which kinds of GPUs there are.
    """

    def __init__(self, config: RunConfig, types: Callable[[], set[str]] = gpu_types) -> None:
        self._config = config
        self._types = types
        self._counted: dict[str, float] = {}
        if config.profile.operations:
            threading.Thread(target=self._count, name="operations", daemon=True).start()

    def rates(self, infos: Sequence[GroupInfo], numbers: Mapping[str, float], ranks: int) -> dict[str, float]:
        """TFLOP/s of each member of a role, and its share of its GPU's peak, as metrics.

        Args:
            infos: the iteration's groups.
            numbers: its metrics, with those of its update.
            ranks: of the learner group.
        """
        counted = self._counted
        if not counted:
            return {}
        drawing = sum(info.seconds["total"] for info in infos)
        learning = numbers["time/update_s"] * ranks
        drawn = counted["group"] * len(infos)
        learned = counted["transition"] * numbers["policy/transitions"]
        work = {"rollout": (drawn, drawing), "learner": (learned, learning)}
        rates = {role: flops / s / TERA for role, (flops, s) in work.items() if s > 0}
        found = {f"achieved/{role}_tflops": rate for role, rate in rates.items()}
        peak = self._peak()
        if peak is not None:
            pools = self._config.pools
            on_gpus = {"rollout": pools.rollout.num_gpus > 0, "learner": pools.learner.num_gpus > 0}
            found |= {f"achieved/{role}_mfu": rate / peak for role, rate in rates.items() if on_gpus[role]}
        return found

    def _peak(self) -> float | None:
        """Peak of the cluster's GPUs in the model's type, None where it is not known or they differ."""
        if self._config.model.dtype != "bfloat16":
            return None
        types = self._types()
        return PEAKS.get(types.pop()) if len(types) == 1 else None

    def _count(self) -> None:
        from orchestrator.plan.hardware import Hardware
        from orchestrator.plan.plan import blocks_of_prm, make_plan

        try:
            plan = make_plan(self._config, Hardware(), blocks_of_prm(self._config, None))
        except ConfigError as error:
            log.warning("operations are not counted: %s", error)
            return
        work = plan.work
        self._counted = {
            "group": plan.petaflops["rollout"] * PETA / work.groups,
            "transition": plan.petaflops["learner"] * PETA / (work.groups * work.rows),
        }

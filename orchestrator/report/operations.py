"""Floating-point operations a second that the policy's network achieves, from the plan's count of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.wire.records import GroupInfo

log = logging.getLogger(__name__)

TERA, PETA = 1e12, 1e15


class Operations:
    """Turns an iteration's seconds into rates; counting takes up to a minute, on a thread, and no rate is known before.

    Args:
        config: configuration of the run; without ``profile.operations`` nothing is counted.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._counted: dict[str, float] = {}
        if config.profile.operations:
            threading.Thread(target=self._count, name="operations", daemon=True).start()

    def rates(self, infos: Sequence[GroupInfo], numbers: Mapping[str, float], ranks: int) -> dict[str, float]:
        """TFLOP/s of each member of a role, as metrics.

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
        return {f"achieved/{role}_tflops": flops / s / TERA for role, (flops, s) in work.items() if s > 0}

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

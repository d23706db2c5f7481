"""Groups that are drawn and scored in this process, with numbers that follow from their ordinal."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from euphonium.config import RunConfig
from euphonium.wire.records import GroupInfo, GroupTask
from orchestrator.groups.credit import ScoredGroup

SECONDS = {"weights": 0.25, "process_reward": 0.5, "total": 2.0}


def scores_of(config: RunConfig, group_id: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([1, group_id])
    return {r.name: rng.random(config.rollout.group_size, np.float32) for r in config.rewards.outcome}


def process_of(config: RunConfig, group_id: int) -> np.ndarray:
    return np.random.default_rng([2, group_id]).random(
        (config.rollout.group_size, config.sampler.num_steps), np.float32
    )


def info_of(config: RunConfig, task: GroupTask, version: int = 0) -> GroupInfo:
    return GroupInfo(
        task=task, policy_version=version, fingerprint="", rows=np.arange(3 * 2).reshape(3, 2),
        process_rewards=process_of(config, task.group_id), seconds=SECONDS, payload_bytes=10,
    )  # fmt: skip


def scored(config: RunConfig, group_id: int) -> ScoredGroup:
    info = info_of(config, GroupTask(group_id=group_id, prompt="a prompt", seed=group_id))
    latents: Any = f"latents of group {group_id}"
    payload: Any = f"payload of group {group_id}"
    return ScoredGroup(info, latents, payload, scores_of(config, group_id), 0.5)


class Rollouts:
    """Stands where the pools are.

    Attributes:
        drawn: ordinals of the groups that were asked for.
        errors: what drawing or scoring a group raises, by its ordinal.
        held_back: groups that do not come before they are taken out of here.
        parts: in how many parts each group is drawn, by its ordinal; 0 for whole.
        cancelled: ordinals of the groups whose drawing was given up.
        deadlines: of every scoring.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.drawn: list[int] = []
        self.parts: dict[int, int] = {}
        self.errors: dict[int, Exception] = {}
        self.held_back: set[int] = set()
        self.cancelled: list[int] = []
        self.deadlines: set[float] = set()

    async def draw(self, task: GroupTask, parts: Sequence[tuple[int, int]] = ()) -> Any:
        self.drawn.append(task.group_id)
        self.parts[task.group_id] = len(parts)
        try:
            await asyncio.sleep(0)
            while task.group_id in self.held_back:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(task.group_id)
            raise
        group = scored(self.config, task.group_id)
        return info_of(self.config, task), group.latents, group.payload

    async def scores(self, latents: Any, prompts: list[str], timeout_s: float, optional: Sequence[str]) -> Any:
        group_id = int(latents.rsplit(" ", 1)[1])
        assert len(prompts) == self.config.rollout.group_size
        self.deadlines.add(timeout_s)
        if group_id in self.errors:
            raise self.errors[group_id]
        return scores_of(self.config, group_id), 0.5

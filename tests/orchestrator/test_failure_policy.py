"""What the run loop does with a group whose rewards cannot be had."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.errors import RewardError
from euphonium.wire.records import GroupInfo, GroupTask
from orchestrator.groups.batches import BatchSource
from orchestrator.groups.credit import ScoredGroup
from orchestrator.groups.guidance_control import GuidanceControl
from orchestrator.groups.prompts import PromptStream
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.pools.run_pools import ActorFactories, RunPools
from orchestrator.report.statistics import RewardFailures
from orchestrator.report.tracking import Progress
from orchestrator.state.checkpoints import RunState
from orchestrator.state.position import Position

MakeConfig = Callable[..., RunConfig]


class ScriptedSource(BatchSource):
    """Batches whose roles are replaced by a script: which groups fail, and with what."""

    errors: dict[int, Exception]
    asked: list[int]

    async def _draw_and_score(self, task: GroupTask, parts: Sequence[tuple[int, int]]) -> ScoredGroup:
        self.asked.append(task.group_id)
        if task.group_id in self.errors:
            raise self.errors[task.group_id]
        info = GroupInfo(
            task=task, policy_version=0, fingerprint="",
            rows=np.arange(3 * 4).reshape(3, 4), process_rewards=None, seconds={"total": 1.0},
            payload_bytes=0,
        )  # fmt: skip
        return ScoredGroup(info, None, None, {"icon": np.zeros(3, np.float32)}, 0.1)


def collect(config: RunConfig, errors: dict[int, Exception]) -> tuple[Any, dict[str, float], list[int]]:
    position = Position(RunState(iteration=0, next_group=0, world_size=1))
    pools = RunPools(config, ActorFactories(prm=nobody, orm=nobody, rollout=nobody), Progress(1, 0))
    rollouts = RolloutService(config, pools, position, never)
    failures = RewardFailures(config.rewards)

    async def next_batch() -> Any:
        source = ScriptedSource(
            config, rollouts, position, PromptStream(["a prompt"], 0), failures, GuidanceControl(None, 0)
        )
        source.errors, source.asked = errors, []
        return await source.next(), source.asked

    batch, asked = asyncio.run(next_batch())
    return (len(batch.groups), batch.dropped), failures.take(), asked


def nobody(index: int, options: Any) -> Any:
    raise AssertionError("no actor is started")


async def never() -> None:
    raise AssertionError("no weights are missing")


def test_a_failed_reward_drops_its_group_and_is_counted(make_config: MakeConfig) -> None:
    config = make_config("rollout.prompts_per_iteration=4")
    outcome, failures, asked = collect(config, {2: RewardError("the prm pool did not answer", ["process"])})
    assert outcome == (3, 1)
    assert failures == {
        "rewards/failures/icon": 0, "rewards/failures/motion": 0, "rewards/failures/quality": 0,
        "rewards/failures/process": 1,
    }  # fmt: skip
    # The request has been through its own attempts; drawing the group again would only repeat them.
    assert sorted(asked) == [0, 1, 2, 3]


def test_too_many_dropped_groups_end_the_run(make_config: MakeConfig) -> None:
    errors: dict[int, Exception] = {i: RewardError("the orm pool did not answer", ["icon"]) for i in (0, 1)}
    with pytest.raises(RewardError, match=r"2 of 4 groups were lost.*max_dropped_fraction.*the orm pool did not"):
        collect(make_config("rollout.prompts_per_iteration=4"), errors)


@pytest.mark.parametrize("reward", ["icon", "process"])
def test_a_reward_may_stop_the_run_at_its_first_failure(make_config: MakeConfig, reward: str) -> None:
    prefix = "rewards.process" if reward == "process" else "rewards.outcome"
    change = (
        f"{prefix}.on_failure=abort" if reward == "process"
        else f"{prefix}=[{{name: icon, type: sprite_icon, on_failure: abort}}]"
    )  # fmt: skip
    config = make_config("rollout.prompts_per_iteration=8", change)
    with pytest.raises(RewardError, match=f"reward '{reward}' failed, and its on_failure is abort: judge down"):
        collect(config, {5: RewardError("judge down", [reward])})

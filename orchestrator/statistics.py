"""Numbers about the rewards of an iteration, for the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from core.config import RunConfig
from core.records import Array, GroupInfo
from dynamics import Advantages


def rollout_statistics(
    config: RunConfig,
    infos: Sequence[GroupInfo],
    scores: Sequence[Mapping[str, Array]],
    advantages: Sequence[Advantages],
) -> dict[str, float]:
    """Metrics of the drawn and scored groups of one iteration."""
    record: dict[str, float] = {}
    for name in scores[0]:
        values = np.stack([group[name] for group in scores]).astype(np.float64)
        record[f"reward/{name}/mean"] = float(values.mean())
        record[f"reward/{name}/std"] = float(values.std())
        record[f"reward/{name}/group_std"] = float(values.std(axis=1).mean())
    processes = [info.process_rewards for info in infos if info.process_rewards is not None]
    if processes:
        stacked = np.stack(processes).astype(np.float64)
        weights = {reward.name: reward.weight for reward in config.rewards.outcome}
        totals = np.stack([sum(weights[n] * v.astype(np.float64) for n, v in group.items()) for group in scores])
        record["process/mean"] = float(stacked.mean())
        record["process/final_mean"] = float(stacked[:, :, -1].mean())
        record["process/outcome_correlation"] = _within_group_correlation(stacked[:, :, -1], totals)
    record["advantage/zero_std_groups"] = float(sum(len(a.flat) == len(scores[0]) for a in advantages))
    record["advantage/std"] = float(np.concatenate([a.values.numpy().ravel() for a in advantages]).std())
    seconds = [info.seconds for info in infos]
    total = sum(part["total"] for part in seconds)
    record["rollout/prm_wait_fraction"] = sum(part["process_reward"] for part in seconds) / total
    record["rollout/groups"] = float(len(infos))
    record["rollout/samples"] = float(len(infos) * config.rollout.group_size)
    return record


def _within_group_correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two ``[groups, samples]`` arrays after centring each group; 0 without spread."""
    x = a - a.mean(axis=1, keepdims=True)
    y = b - b.mean(axis=1, keepdims=True)
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0

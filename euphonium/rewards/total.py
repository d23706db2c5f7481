"""The weighted total of several outcome rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from euphonium.config import OutcomeRewardConfig
from euphonium.wire.records import Array


def weighted_total(
    scores: Mapping[str, Array], rewards: Sequence[OutcomeRewardConfig], samples: int
) -> NDArray[np.float64]:
    """Weighted sum of the outcome rewards of each sample.

    Args:
        scores: rewards by name, ``[samples]`` each; those of weight 0 may be missing.
        rewards: the recipe's rewards, with their weights.
        samples: number of samples.

    Returns:
        ``[samples]``.
    """
    total = np.zeros(samples, dtype=np.float64)
    for reward in rewards:
        if reward.weight != 0:
            total += reward.weight * scores[reward.name].astype(np.float64)
    return total


def total_weight(rewards: Sequence[OutcomeRewardConfig]) -> float:
    """Sum of the absolute weights: a total divided by it is on the scale of a single reward."""
    return sum(abs(reward.weight) for reward in rewards)

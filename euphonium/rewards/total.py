"""The weighted total of several outcome rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from euphonium.config import OutcomeRewardConfig
from euphonium.wire.records import Array


def weighted_total(scores: Mapping[str, Array], rewards: Sequence[OutcomeRewardConfig]) -> NDArray[np.float64]:
    """Weighted sum of the outcome rewards of each sample.

    Args:
        scores: rewards by name, ``[samples]`` each.
        rewards: the recipe's rewards, with their weights.

    Returns:
        ``[samples]``.
    """
    weights = {reward.name: reward.weight for reward in rewards}
    total: NDArray[np.float64] = np.sum(
        [weights[name] * values.astype(np.float64) for name, values in scores.items()], axis=0
    )
    return total


def total_weight(rewards: Sequence[OutcomeRewardConfig]) -> float:
    """Sum of the absolute weights: a total divided by it is on the scale of a single reward."""
    return sum(abs(reward.weight) for reward in rewards)

"""What several outcome rewards are worth together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from euphonium.config import OutcomeRewardConfig
from euphonium.wire.records import Array


def weighted_total(scores: Mapping[str, Array], rewards: Sequence[OutcomeRewardConfig]) -> NDArray[np.float64]:
    """Weighted sum of the outcome rewards of each sample.

    Args:
        scores: for every reward, ``[samples]``.
        rewards: of the recipe, with their weights.

    Returns:
        ``[samples]``.
    """
    weights = {reward.name: reward.weight for reward in rewards}
    total: NDArray[np.float64] = np.sum(
        [weights[name] * values.astype(np.float64) for name, values in scores.items()], axis=0
    )
    return total


def total_weight(rewards: Sequence[OutcomeRewardConfig]) -> float:
    """Sum of the weights' sizes, which brings totals to the scale of a single reward."""
    return sum(abs(reward.weight) for reward in rewards)

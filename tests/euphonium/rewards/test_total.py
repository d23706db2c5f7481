import numpy as np

from euphonium.config import OutcomeRewardConfig
from euphonium.rewards.total import total_weight, weighted_total


def test_totals_are_weighted_sums() -> None:
    rewards = [
        OutcomeRewardConfig(name=name, type="sprite_icon", weight=weight)
        for name, weight in (("icon", 1.0), ("motion", -3.0), ("quality", 0.5))
    ]
    scores = {"icon": np.array([1.0, 0.0]), "motion": np.array([0.0, 1.0]), "quality": np.array([1.0, 1.0])}
    total = weighted_total({name: values.astype(np.float32) for name, values in scores.items()}, rewards, 2)
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, [1.5, -2.5])
    assert total_weight(rewards) == 4.5


def test_rewards_of_weight_0_may_be_missing() -> None:
    rewards = [OutcomeRewardConfig(name="icon", type="sprite_icon", weight=0.0)]
    np.testing.assert_array_equal(weighted_total({}, rewards, 3), np.zeros(3))
    np.testing.assert_array_equal(weighted_total({"icon": np.array([np.nan] * 3)}, rewards, 3), np.zeros(3))

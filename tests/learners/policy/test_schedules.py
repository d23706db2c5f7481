from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from learners.policy.schedules import kl_controller, kl_weight, learning_rate


@pytest.mark.parametrize(
    ("schedule", "after"),
    [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.0]), ("cosine", [1.0, 0.8535534, 0.0])],
)
def test_the_rate_rises_over_the_warm_up_and_falls_over_the_rest_of_the_run(
    make_config: Callable[..., RunConfig], schedule: str, after: list[float]
) -> None:
    config = make_config(
        "iterations=5", "objective.updates_per_iteration=2", f"optimizer.schedule={schedule}",
        "optimizer.warmup_updates=2", "optimizer.learning_rate=1e-3",
    )  # fmt: skip
    assert [learning_rate(config, done) for done in (0, 1)] == pytest.approx([5e-4, 1e-3])
    # Of the eight updates after the warm-up: before the first, after a quarter, and beyond the last.
    found = [learning_rate(config, done) for done in (2, 4, 12)]
    assert found == pytest.approx([1e-3 * part for part in after], rel=1e-6, abs=1e-12)


def test_a_controller_decides_the_weight_of_the_penalty_if_there_is_one(make_config: Callable[..., RunConfig]) -> None:
    assert kl_weight(make_config().objective.kl, None) == 0
    kl = make_config("objective.kl={anchor: fixed, weight: 0.3}").objective.kl
    assert kl_controller(kl) is None
    assert kl_weight(kl, kl_controller(kl)) == 0.3
    kl = make_config("objective.kl={anchor: fixed, controller: {target: 0.1, minimum: 1.0e-6}}").objective.kl
    assert kl_weight(kl, kl_controller(kl)) == 1e-6

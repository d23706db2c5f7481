"""Recipes in which something goes by outcome rewards that all have weight 0."""

from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from euphonium.errors import ConfigError

UNWEIGHTED = "rewards.outcome=[{name: icon, type: sprite_icon, weight: 0}]"
PROCESS = "advantage.mode=process"


def test_process_rewards_alone_may_be_trained_on(make_config: Callable[..., RunConfig]) -> None:
    assert make_config(UNWEIGHTED, PROCESS).rewards.optional == ("icon",)
    assert make_config(PROCESS).rewards.optional == ()


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["sampler.guidance={source: spsa, scale: 0.1}"], r"sampler\.guidance\.source: spsa"),
        (["rewards.process.refresh={every: 2}"], r"rewards\.process\.refresh"),
        (["advantage.best_of=1"], r"advantage\.best_of"),
    ],
)
def test_what_goes_by_outcome_rewards_needs_their_weights(
    overrides: list[str], field: str, make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=rf"{field} goes by the weighted outcome rewards, all of which have weight 0"):
        make_config(UNWEIGHTED, "advantage.mode=both", *overrides)


def test_best_of_needs_outcome_advantages(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"advantage\.best_of chooses by outcome advantages"):
        make_config(PROCESS, "advantage.best_of=1")

"""Guidance that follows what it earns: its strength as a function of the records."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from euphonium.config import GuidanceConfig, RunConfig
from euphonium.config.sampling import GuidanceControlConfig
from orchestrator.groups.guidance_control import GuidanceControl

SETTINGS = GuidanceControlConfig(raise_by=2.0, lower_by=0.5, confidence=1.0, lowest=0.25, highest=4.0)
GUIDANCE = GuidanceConfig(scale=1.0, strengths=(0.0, 1.0), control=SETTINGS)
measurements = st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 1)), max_size=20)


def records(measured: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [
        {"iteration": i, "guidance/margin": margin, "guidance/margin_error": error}
        for i, (margin, error) in enumerate(measured, start=1)
    ]


@given(measurements)
def test_the_strength_stays_within_its_bounds_and_moves_by_its_factors(measured: list[tuple[float, float]]) -> None:
    control = GuidanceControl(GUIDANCE, 0, records(measured))
    strengths = [control.strength(i) for i in range(len(measured) + 1)]
    assert strengths[0] == 1
    assert all(0.25 <= strength <= 4 for strength in strengths)
    for before, after, (margin, error) in zip(strengths, strengths[1:], measured, strict=False):
        wanted = before * 2 if margin > error else before * 0.5 if margin < 0 else before
        assert after == min(max(wanted, 0.25), 4.0)


@given(measurements, st.integers(0, 3))
def test_an_iteration_drawn_ahead_uses_only_what_is_surely_known(
    measured: list[tuple[float, float]], staleness: int
) -> None:
    whole = GuidanceControl(GUIDANCE, staleness, records(measured))
    for iteration in range(len(measured) + 1):
        known = GuidanceControl(GUIDANCE, staleness, records(measured)[: max(0, iteration - staleness)])
        assert known.strength(iteration) == whole.strength(iteration)


def test_a_resumed_run_goes_on_with_the_strength_of_an_undisturbed_one() -> None:
    undisturbed = GuidanceControl(GUIDANCE, 0)
    for record in records([(0.5, 0.1), (0.5, 0.1), (-0.5, 0.1)]):
        undisturbed.observe(int(record["iteration"]), record)
    resumed = GuidanceControl(GUIDANCE, 0, records([(0.5, 0.1), (0.5, 0.1)]))
    assert resumed.strength(2) == undisturbed.strength(2) == 4
    assert resumed.observe(3, records([(-0.5, 0.1)])[0]) == {"guidance/strength": 4.0}
    assert resumed.strength(3) == undisturbed.strength(3) == 2


def test_an_iteration_that_is_done_again_counts_once() -> None:
    control = GuidanceControl(GUIDANCE, 0)
    for margin in (-0.5, 0.5):
        control.observe(1, {"guidance/margin": margin, "guidance/margin_error": 0.1})
    assert control.strength(1) == 2


def test_without_control_the_strength_is_the_recipes() -> None:
    control = GuidanceControl(GUIDANCE.model_copy(update={"control": None}), 0, records([(1.0, 0.1)]))
    assert control.strength(7) == 1
    assert control.observe(2, {"guidance/margin": 1.0, "guidance/margin_error": 0.1}) == {}


def test_guidance_without_gain_dies_down() -> None:
    generator = random.Random(3)
    control = GuidanceControl(GUIDANCE, 0)
    for number in range(1, 41):
        control.observe(number, {"guidance/margin": generator.gauss(-0.2, 0.1), "guidance/margin_error": 0.1})
    assert math.isclose(control.strength(40), 0.25)


def test_control_needs_members_to_compare(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(Exception, match=r"sampler.guidance.strengths, for example \[0, 1\]"):
        make_config("sampler.guidance.control={}", "sampler.guidance.strengths=[1, 1]")
    with pytest.raises(Exception, match="must lie in"):
        make_config("sampler.guidance.control={highest: 0.5, lowest: 0.1}", "sampler.guidance.strengths=[0, 1]")
    with pytest.raises(Exception, match="put 0 among"):
        make_config("advantage.baseline=unguided", "sampler.guidance.strengths=[1, 2]")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from euphonium.dynamics.windows import random_window, sliding_window


def test_a_sliding_window_visits_every_step_and_starts_over() -> None:
    places = [sliding_window(i, size=4, allowed=(0, 9), stride=2, every=3) for i in range(15)]
    assert places[::3] == [(0, 4), (2, 6), (4, 8), (5, 9), (0, 4)]
    assert places[0] == places[1] == places[2]


@given(
    iteration=st.integers(0, 500), size=st.integers(1, 6), extra=st.integers(0, 12), first=st.integers(0, 5),
    stride=st.integers(1, 5), every=st.integers(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_windows_are_never_empty_and_stay_inside(
    iteration: int, size: int, extra: int, first: int, stride: int, every: int, seed: int
) -> None:
    allowed = (first, first + size + extra)
    for start, stop in (
        sliding_window(iteration, size=size, allowed=allowed, stride=stride, every=every),
        random_window(iteration, size=size, allowed=allowed, seed=seed),
    ):
        assert stop - start == size
        assert allowed[0] <= start
        assert stop <= allowed[1]


def test_a_random_window_depends_on_seed_and_iteration_alone() -> None:
    draws = [random_window(i, size=2, allowed=(0, 10), seed=1) for i in range(50)]
    assert draws == [random_window(i, size=2, allowed=(0, 10), seed=1) for i in range(50)]
    assert len(set(draws)) > 5
    assert draws != [random_window(i, size=2, allowed=(0, 10), seed=2) for i in range(50)]


def test_a_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        sliding_window(0, size=5, allowed=(2, 6), stride=1, every=1)

"""How busy a pool is, against sums done by hand."""

import pytest

from orchestrator.pools.load import Load


class Clock:
    """Time that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load(clock)


def test_work_of_callers_counts_as_a_share_of_all_members_time(load: Load, clock: Clock) -> None:
    load.begin("a")
    clock.now += 3
    load.end("a")
    clock.now += 2
    assert load.close(2) == pytest.approx(3 / (5 * 2))
    clock.now += 1
    assert load.close(2) == load.last == 0


def test_work_under_way_counts_in_both_windows_with_its_part(load: Load, clock: Clock) -> None:
    clock.now += 1
    load.begin("a")
    clock.now += 3
    assert load.close(1) == pytest.approx(3 / 4)
    clock.now += 2
    load.end("a")
    clock.now += 6
    assert load.close(1) == pytest.approx(2 / 8)


def test_members_that_count_themselves_report_totals(load: Load, clock: Clock) -> None:
    load.read("a", 50.0)
    load.read("a", 52.0)
    load.read("b", 7.0)
    clock.now += 4
    assert load.close(2) == pytest.approx(2 / 8)
    load.read("a", 53.5)
    load.read("b", 7.5)
    clock.now += 4
    assert load.close(2) == pytest.approx(2 / 8)


def test_a_member_that_started_anew_begins_at_its_first_reading(load: Load, clock: Clock) -> None:
    load.read("a", 50.0)
    load.read("a", 2.0)
    load.read("a", 3.0)
    load.read("b", 9.0)
    load.forget("b")
    load.read("b", 11.0)
    clock.now += 10
    assert load.close(1) == pytest.approx(1 / 10)


def test_a_share_is_at_most_one_and_a_window_of_no_length_or_no_member_divides_by_nothing(
    load: Load, clock: Clock
) -> None:
    assert load.close(0) == 0
    load.read("a", 0.0)
    load.read("a", 30.0)
    clock.now += 10
    assert load.close(1) == 1

"""Choice of servers from what became of the requests before."""

import pytest

from euphonium.config import BreakerConfig, OutcomeRewardConfig, RewardsConfig
from euphonium.wire.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker_of(members: list[str], clock: Clock, near: str = "") -> Breaker[str]:
    outcome = [OutcomeRewardConfig(name="icon", type="sprite_icon")]
    settings = BreakerConfig(failures=3, cool_down_s=10.0)
    config = RewardsConfig(outcome=outcome, breaker=settings, deadline_s=8.0, attempts=3)
    return Breaker(lambda: members, config, near=lambda server: server in near, clock=clock)


def test_requests_go_round() -> None:
    breaker = breaker_of(["a", "b", "c"], Clock())
    assert [breaker.choose() for _ in range(4)] == [("a", 0), ("b", 0), ("c", 0), ("a", 0)]


def test_servers_of_the_own_node_are_asked_as_long_as_they_answer() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b", "c", "d"], clock, near="bd")
    assert [breaker.choose()[0] for _ in range(8)].count("b") > 0
    assert {breaker.choose()[0] for _ in range(8)} == {"b", "d"}
    breaker.failed("b")
    assert {breaker.choose()[0] for _ in range(4)} == {"d"}
    breaker.failed("d")
    assert {breaker.choose()[0] for _ in range(4)} == {"a", "c"}
    clock.now += 2.0
    assert {breaker.choose()[0] for _ in range(8)} == {"b", "d"}


def test_a_failed_server_is_left_alone_for_longer_every_time_and_others_take_over() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    breaker.failed("a")
    assert [breaker.choose()[0] for _ in range(3)] == ["b"] * 3
    clock.now += 2.0
    assert {breaker.choose()[0] for _ in range(2)} == {"a", "b"}
    breaker.failed("a")
    breaker.failed("a")
    clock.now += 9.9
    assert {breaker.choose()[0] for _ in range(4)} == {"b"}


def test_the_breaker_lets_one_probe_through_whose_outcome_decides() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(3):
        breaker.failed("a")
    clock.now += 10.0
    chosen = [breaker.choose()[0] for _ in range(6)]
    assert chosen.count("a") == 1
    breaker.failed("a")
    clock.now += 9.9
    assert "a" not in [breaker.choose()[0] for _ in range(6)]
    clock.now += 0.2
    assert [breaker.choose()[0] for _ in range(6)].count("a") == 1
    breaker.succeeded("a")
    assert [breaker.choose()[0] for _ in range(6)].count("a") == 3


def test_requests_that_fail_together_count_once() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(5):
        breaker.failed("a", asked_at=clock.now - 1)
    clock.now += 2.0
    assert [breaker.choose()[0] for _ in range(4)].count("a") == 2
    for _ in range(2):
        clock.now += 1.0
        breaker.failed("a", asked_at=clock.now)
    clock.now += 9.9
    assert [breaker.choose()[0] for _ in range(4)].count("a") == 0


def test_a_probe_whose_outcome_never_comes_is_followed_by_another() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(3):
        breaker.failed("a")
    clock.now += 10.0
    assert [breaker.choose()[0] for _ in range(4)].count("a") == 1
    clock.now += 10.0
    assert [breaker.choose()[0] for _ in range(4)].count("a") == 1


def test_when_all_servers_are_left_alone_the_first_one_due_is_waited_for() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    breaker.failed("a")
    clock.now += 1.0
    breaker.failed("b")
    server, pause = breaker.choose()
    assert (server, pause) == ("a", pytest.approx(1.0))
    for _ in range(3):
        breaker.failed("a")
        breaker.failed("b")
    # Many callers wait at the same time; none of them waits for longer than an answer may take.
    assert all(0 < breaker.choose()[1] <= 8.0 for _ in range(10))


def test_dead_servers_are_never_asked() -> None:
    clock = Clock()
    members = ["a", "b"]
    breaker = breaker_of(members, clock)
    breaker.failed("a", dead="killed by SIGKILL")
    clock.now += 1000
    assert {breaker.choose()[0] for _ in range(4)} == {"b"}
    breaker.failed("b", dead="node lost")
    with pytest.raises(LookupError, match="node lost"):
        breaker.choose()
    members.append("c")
    assert breaker.choose() == ("c", 0)

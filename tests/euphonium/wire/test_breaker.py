"""Choice of servers from what became of the requests before."""

import pytest

from euphonium.config import BreakerConfig, OutcomeRewardConfig, RewardsConfig
from euphonium.wire.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker_of(members: list[str], clock: Clock) -> Breaker[str]:
    outcome = [OutcomeRewardConfig(name="icon", type="sprite_icon")]
    settings = BreakerConfig(failures=3, cool_down_s=10.0)
    config = RewardsConfig(outcome=outcome, breaker=settings, deadline_s=8.0, attempts=3)
    return Breaker(lambda: members, config, clock=clock)


def choose(breaker: Breaker[str]) -> tuple[str, float]:
    """The first candidate, and the pause before it is asked."""
    candidates, pause = breaker.candidates()
    assert pause > 0 or breaker.admit(candidates[0])
    return candidates[0], pause


def test_requests_go_round() -> None:
    breaker = breaker_of(["a", "b", "c"], Clock())
    assert [choose(breaker) for _ in range(4)] == [("a", 0), ("b", 0), ("c", 0), ("a", 0)]


def test_a_failed_server_is_left_alone_for_longer_every_time_and_others_take_over() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    breaker.failed("a")
    assert [choose(breaker)[0] for _ in range(3)] == ["b"] * 3
    clock.now += 2.0
    assert {choose(breaker)[0] for _ in range(2)} == {"a", "b"}
    breaker.failed("a")
    breaker.failed("a")
    clock.now += 9.9
    assert {choose(breaker)[0] for _ in range(4)} == {"b"}


def test_the_breaker_lets_one_probe_through_whose_outcome_decides() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(3):
        breaker.failed("a")
    clock.now += 10.0
    chosen = [choose(breaker)[0] for _ in range(6)]
    assert chosen.count("a") == 1
    breaker.failed("a")
    clock.now += 9.9
    assert "a" not in [choose(breaker)[0] for _ in range(6)]
    clock.now += 0.2
    assert [choose(breaker)[0] for _ in range(6)].count("a") == 1
    breaker.succeeded("a")
    assert [choose(breaker)[0] for _ in range(6)].count("a") == 3


def test_requests_that_fail_together_count_once() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(5):
        breaker.failed("a", asked_at=clock.now - 1)
    clock.now += 2.0
    assert [choose(breaker)[0] for _ in range(4)].count("a") == 2
    for _ in range(2):
        clock.now += 1.0
        breaker.failed("a", asked_at=clock.now)
    clock.now += 9.9
    assert [choose(breaker)[0] for _ in range(4)].count("a") == 0


def test_of_requests_that_choose_together_one_is_the_probe() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(3):
        breaker.failed("a")
    clock.now += 10.0
    offered = [breaker.candidates() for _ in range(3)]
    assert all(set(servers) == {"a", "b"} and pause == 0 for servers, pause in offered)
    assert [breaker.admit("a") for _ in offered] == [True, False, False]
    assert [breaker.admit("b") for _ in offered] == [True, True, True]


def test_a_probe_whose_outcome_never_comes_is_followed_by_another() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    for _ in range(3):
        breaker.failed("a")
    clock.now += 10.0
    assert [choose(breaker)[0] for _ in range(4)].count("a") == 1
    clock.now += 10.0
    assert [choose(breaker)[0] for _ in range(4)].count("a") == 1


def test_when_all_servers_are_left_alone_the_first_one_due_is_waited_for() -> None:
    clock = Clock()
    breaker = breaker_of(["a", "b"], clock)
    breaker.failed("a")
    clock.now += 1.0
    breaker.failed("b")
    server, pause = choose(breaker)
    assert (server, pause) == ("a", pytest.approx(1.0))
    for _ in range(3):
        breaker.failed("a")
        breaker.failed("b")
    # Many callers wait at the same time; none of them waits for longer than an answer may take.
    assert all(0 < choose(breaker)[1] <= 8.0 for _ in range(10))


def test_dead_servers_are_never_asked() -> None:
    clock = Clock()
    members = ["a", "b"]
    breaker = breaker_of(members, clock)
    breaker.failed("a", dead="killed by SIGKILL")
    clock.now += 1000
    assert {choose(breaker)[0] for _ in range(4)} == {"b"}
    breaker.failed("b", dead="node lost")
    with pytest.raises(LookupError, match="node lost"):
        choose(breaker)
    members.append("c")
    assert choose(breaker) == ("c", 0)

"""Choice of servers, breaker and retries, without Ray."""

import asyncio
from typing import Any

import pytest

from euphonium.config import BreakerConfig, OutcomeRewardConfig, RewardsConfig
from euphonium.errors import RewardError
from euphonium.wire.servers import ServerPool


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pool_of(members: list[str], clock: Clock, near: str = "", **changes: Any) -> ServerPool:
    outcome = [OutcomeRewardConfig(name="icon", type="sprite_icon")]
    breaker = BreakerConfig(failures=3, cool_down_s=10.0)
    config = RewardsConfig(outcome=outcome, breaker=breaker, **{"deadline_s": 8.0, "attempts": 3} | changes)
    return ServerPool("orm", lambda: members, config, rewards=["icon"], clock=clock, near=lambda server: server in near)


def test_requests_go_round() -> None:
    pool = pool_of(["a", "b", "c"], Clock())
    assert [pool.choose() for _ in range(4)] == [("a", 0), ("b", 0), ("c", 0), ("a", 0)]


def test_servers_of_the_own_node_are_asked_as_long_as_they_answer() -> None:
    clock = Clock()
    pool = pool_of(["a", "b", "c", "d"], clock, near="bd")
    assert [pool.choose()[0] for _ in range(8)].count("b") > 0
    assert {pool.choose()[0] for _ in range(8)} == {"b", "d"}
    pool.failed("b")
    assert {pool.choose()[0] for _ in range(4)} == {"d"}
    pool.failed("d")
    assert {pool.choose()[0] for _ in range(4)} == {"a", "c"}
    clock.now += 2.0
    assert {pool.choose()[0] for _ in range(8)} == {"b", "d"}


def test_a_failed_server_is_left_alone_for_longer_every_time_and_others_take_over() -> None:
    clock = Clock()
    pool = pool_of(["a", "b"], clock)
    pool.failed("a")
    assert [pool.choose()[0] for _ in range(3)] == ["b"] * 3
    clock.now += 2.0
    assert {pool.choose()[0] for _ in range(2)} == {"a", "b"}
    pool.failed("a")
    pool.failed("a")
    clock.now += 9.9
    assert {pool.choose()[0] for _ in range(4)} == {"b"}


def test_the_breaker_lets_one_probe_through_whose_outcome_decides() -> None:
    clock = Clock()
    pool = pool_of(["a", "b"], clock)
    for _ in range(3):
        pool.failed("a")
    clock.now += 10.0
    chosen = [pool.choose()[0] for _ in range(6)]
    assert chosen.count("a") == 1
    pool.failed("a")
    clock.now += 9.9
    assert "a" not in [pool.choose()[0] for _ in range(6)]
    clock.now += 0.2
    assert [pool.choose()[0] for _ in range(6)].count("a") == 1
    pool.succeeded("a")
    assert [pool.choose()[0] for _ in range(6)].count("a") == 3


def test_requests_that_fail_together_count_once() -> None:
    clock = Clock()
    pool = pool_of(["a", "b"], clock)
    for _ in range(5):
        pool.failed("a", asked_at=clock.now - 1)
    clock.now += 2.0
    assert [pool.choose()[0] for _ in range(4)].count("a") == 2
    for _ in range(2):
        clock.now += 1.0
        pool.failed("a", asked_at=clock.now)
    clock.now += 9.9
    assert [pool.choose()[0] for _ in range(4)].count("a") == 0


def test_a_probe_whose_outcome_never_comes_is_followed_by_another() -> None:
    clock = Clock()
    pool = pool_of(["a", "b"], clock)
    for _ in range(3):
        pool.failed("a")
    clock.now += 10.0
    assert [pool.choose()[0] for _ in range(4)].count("a") == 1
    clock.now += 10.0
    assert [pool.choose()[0] for _ in range(4)].count("a") == 1


def test_when_all_servers_are_left_alone_the_first_one_due_is_waited_for() -> None:
    clock = Clock()
    pool = pool_of(["a", "b"], clock)
    pool.failed("a")
    clock.now += 1.0
    pool.failed("b")
    server, pause = pool.choose()
    assert (server, pause) == ("a", pytest.approx(1.0))
    for _ in range(3):
        pool.failed("a")
        pool.failed("b")
    # Many callers wait at the same time; none of them waits for longer than an answer may take.
    assert all(0 < pool.choose()[1] <= 8.0 for _ in range(10))


def test_dead_servers_are_never_asked_and_a_dead_pool_is_an_error_that_says_what_to_do() -> None:
    clock = Clock()
    members = ["a", "b"]
    pool = pool_of(members, clock)
    pool.failed("a", dead="killed by SIGKILL")
    clock.now += 1000
    assert {pool.choose()[0] for _ in range(4)} == {"b"}
    pool.failed("b", dead="node lost")
    with pytest.raises(RewardError, match=r"all 2 servers of the orm pool are dead: node lost.*pools\.orm") as caught:
        pool.choose()
    assert caught.value.rewards == ("icon",)
    members.append("c")
    assert pool.choose() == ("c", 0)


async def answer(value: Any, *, after_s: float = 0.0) -> Any:
    await asyncio.sleep(after_s)
    return value


def test_an_answer_that_does_not_come_in_time_is_asked_for_elsewhere() -> None:
    pool = pool_of(["slow", "quick"], Clock(), deadline_s=0.1)
    asked: list[str] = []

    def send(server: str) -> Any:
        asked.append(server)
        return answer(f"from {server}", after_s=5.0 if server == "slow" else 0.0)

    assert asyncio.run(pool.ask(send)) == "from quick"
    assert asked == ["slow", "quick"]


def test_attempts_are_bounded_and_the_error_lists_them() -> None:
    pool = pool_of(["a", "b"], Clock(), deadline_s=0.05)
    asked: list[str] = []

    def send(server: str) -> Any:
        asked.append(server)
        return answer(None, after_s=5.0)

    with pytest.raises(RewardError, match=r"orm pool did not answer in 3 attempts: no answer within") as caught:
        asyncio.run(pool.ask(send))
    assert len(asked) == 3
    assert caught.value.rewards == ("icon",)

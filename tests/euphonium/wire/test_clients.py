"""Retries in both ways of asking, without Ray: whatever can be awaited or fetched stands in for a reference."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from euphonium.config import BreakerConfig, OutcomeRewardConfig, RewardsConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.wire.clients import RewardClient
from euphonium.wire.roles import ServerRef


def client_of(members: list[str], **changes: Any) -> RewardClient[Any]:
    outcome = [OutcomeRewardConfig(name="icon", type="sprite_icon")]
    breaker = BreakerConfig(failures=3, cool_down_s=10.0)
    config = RewardsConfig(outcome=outcome, breaker=breaker, **{"deadline_s": 8.0, "attempts": 3} | changes)
    handles: Any = members
    return RewardClient("orm", lambda: [ServerRef(handle, handle) for handle in handles], config, clock=lambda: 100.0)


def test_a_dead_pool_is_an_error_that_says_what_to_do() -> None:
    members = ["a", "b"]
    client = client_of(members)
    client.breaker.failed(ServerRef("a", "a"), dead="killed by SIGKILL")
    client.breaker.failed(ServerRef("b", "b"), dead="node lost")
    message = r"all 2 servers of the orm pool are dead: node lost.*pools\.orm"
    with pytest.raises(RewardError, match=message) as caught:
        asyncio.run(client.ask(answer))
    assert caught.value.rewards == ("icon",)
    with pytest.raises(RewardError, match=message):
        client.submit(lambda server: None)
    members.append("c")
    assert asyncio.run(client.ask(answer)) == "c"


def test_a_reference_is_that_of_its_server_wherever_the_server_is() -> None:
    one: Any = "handle"
    assert ServerRef(one, "prm-0", "n1") == ServerRef(one, "prm-0", "n2")
    assert len({ServerRef(one, "prm-0", "n1"), ServerRef(one, "prm-0")}) == 1


async def answer(value: Any, *, after_s: float = 0.0) -> Any:
    await asyncio.sleep(after_s)
    return value


def test_an_answer_that_does_not_come_in_time_is_asked_for_elsewhere() -> None:
    client = client_of(["slow", "quick"], deadline_s=0.1)
    asked: list[str] = []

    def send(server: str) -> Any:
        asked.append(server)
        return answer(f"from {server}", after_s=5.0 if server == "slow" else 0.0)

    assert asyncio.run(client.ask(send)) == "from quick"
    assert asked == ["slow", "quick"]


def test_attempts_are_bounded_and_the_error_lists_them() -> None:
    client = client_of(["a", "b"], deadline_s=0.05)
    asked: list[str] = []

    def send(server: str) -> Any:
        asked.append(server)
        return answer(None, after_s=5.0)

    with pytest.raises(RewardError, match=r"orm pool did not answer in 3 attempts: no answer within") as caught:
        asyncio.run(client.ask(send))
    assert len(asked) == 3
    assert caught.value.rewards == ("icon",)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Has fetching a reference, a server's name, give the next outcome of a list; a sleep passes at once."""

    def prepare(*values: Any) -> tuple[list[str], list[float]]:
        left, fetched, slept = iter(values), [], []

        def get(ref: str, timeout: float) -> Any:
            fetched.append(ref)
            value = next(left)
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr(time, "sleep", slept.append)
        return fetched, slept

    return prepare


def remote(cause: Exception) -> Exception:
    """What Ray raises here for an error of the remote side."""
    error: Exception = RayTaskError("call", "traceback", cause).as_instanceof_cause()
    return error


def test_an_answer_is_asked_for_at_once_and_fetched_later_elsewhere_if_it_must(outcomes: Callable[..., Any]) -> None:
    fetched, slept = outcomes(GetTimeoutError("late"), ActorDiedError(), "answer")
    sent: list[str] = []

    def send(server: str) -> str:
        sent.append(server)
        return server

    later = client_of(["a", "b", "c"]).submit(send)
    assert (sent, fetched) == (["a"], [])
    assert (later.result(), later.result()) == ("answer", "answer")
    assert sent == fetched == ["a", "b", "c"]
    assert slept == [0.0, 0.0]


def test_a_caller_does_not_sleep_before_it_needs_the_answer(outcomes: Callable[..., Any]) -> None:
    fetched, slept = outcomes("answer")
    client = client_of(["a"])
    client.breaker.failed(ServerRef("a", "a"))
    later = client.submit(lambda server: server)
    assert (fetched, slept) == ([], [])
    assert later.result() == "answer"
    assert (fetched, slept) == (["a"], [2.0])


def test_an_error_of_the_sample_is_not_tried_again_and_others_are(outcomes: Callable[..., Any]) -> None:
    outcomes(remote(NonFiniteRewardError("not finite", ["icon"])))
    client = client_of(["a", "b"])
    with pytest.raises(NonFiniteRewardError, match="not finite"):
        client.submit(lambda server: server).result()
    assert set(client.breaker.candidates()[0]) == {ServerRef("a", "a"), ServerRef("b", "b")}
    fetched, _ = outcomes(remote(RewardError("broken", ["motion"])), ActorUnavailableError("restarting", b"0" * 16),
                          remote(ValueError("what")))  # fmt: skip
    message = "did not answer in 3 attempts: broken; .*restarting.*; .*ValueError: what"
    with pytest.raises(RewardError, match=message) as caught:
        client.submit(lambda server: server).result()
    assert len(fetched) == 3
    assert caught.value.rewards == ("icon",)

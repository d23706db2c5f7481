"""Which server gets a request: the choice by itself, and many clients on one event loop around it, without Ray."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from euphonium.config import BreakerConfig, OutcomeRewardConfig, RewardsConfig
from euphonium.wire import balancer as module
from euphonium.wire.balancer import LoadBalancer
from euphonium.wire.clients import RewardClient
from euphonium.wire.roles import ServerRef

SERVERS = ["prm-0", "prm-1", "prm-2", "prm-3"]


# --- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_no_server_is_chosen_while_another_one_has_less_to_do_and_ties_stay_near(seed: int) -> None:
    rng, balancer, load = random.Random(seed), LoadBalancer(), Counter[str]()
    under_way: dict[str, str] = {}
    for number in range(400):
        if under_way and rng.random() < 0.45:
            ticket = rng.choice(sorted(under_way))
            balancer.done(ticket)
            load[under_way.pop(ticket)] -= 1
            continue
        allowed = rng.sample(SERVERS, rng.randint(1, len(SERVERS)))
        near = [server for server in allowed if rng.random() < 0.4]
        chosen = balancer.assign(str(number), allowed, near, 60.0)
        least = min(load[server] for server in allowed)
        idlest = [server for server in allowed if load[server] == least]
        assert chosen in idlest
        assert chosen in near or not set(near) & set(idlest)
        assert chosen == next(server for server in idlest if (server in near) == (chosen in near))
        under_way[str(number)] = chosen
        load[chosen] += 1
    assert balancer.outstanding() == {server: count for server, count in load.items() if count}


def test_a_request_counts_once_wherever_it_goes_and_its_end_counts_once() -> None:
    balancer = LoadBalancer()
    assert balancer.assign("one", ["a", "b"], ["a"], 60.0) == "a"
    assert balancer.assign("one", ["a", "b"], ["b"], 60.0) == "b"
    assert balancer.outstanding() == {"b": 1}
    balancer.done("one")
    balancer.done("one")
    balancer.done("from before the restart")
    assert balancer.outstanding() == {}


def test_a_request_of_a_dead_client_counts_until_its_time_is_over() -> None:
    now = 0.0
    balancer = LoadBalancer(lambda: now)
    balancer.assign("lost", ["a"], [], 10.0)
    balancer.assign("also lost", ["a"], [], 30.0)
    assert balancer.assign("next", ["a", "b"], ["a"], 30.0) == "b"
    now = 10.0
    assert balancer.outstanding() == {"a": 1, "b": 1}
    now = 30.0
    assert balancer.assign("last", ["a", "b"], ["a"], 30.0) == "a"
    assert balancer.outstanding() == {"a": 1}


# --- clients ---------------------------------------------------------------------------------------------------


class Method:
    """A remote method of an actor that is an object on this event loop; its answer takes a moment."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        async def answer() -> Any:
            await asyncio.sleep(0)
            return self._call(*arguments)

        return asyncio.ensure_future(answer())


class Shared:
    """Handle of a load balancer, which may be away."""

    def __init__(self) -> None:
        self.balancer, self.asked, self.away = LoadBalancer(), 0, False
        self.assign, self.done = Method(self._assign), Method(self.balancer.done)

    def _assign(self, *arguments: Any) -> str:
        self.asked += 1
        if self.away:
            raise ActorUnavailableError("restarting", b"0" * 16)
        return self.balancer.assign(*arguments)


class Server:
    """Counts what is outstanding, and answers when it is told to."""

    def __init__(self, name: str) -> None:
        self.name, self.waiting, self.most, self.served = name, list[asyncio.Future[str]](), 0, 0

    def send(self) -> asyncio.Future[str]:
        self.served += 1
        self.waiting = [one for one in self.waiting if not one.done()]
        self.waiting.append(asyncio.get_running_loop().create_future())
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1]

    def answer(self, *outcomes: Any) -> None:
        for outcome in outcomes or [self.name] * len(self.waiting):
            future = self.waiting.pop(0)
            future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def clients_of(
    servers: Sequence[Server], shared: Shared | None, clock: Clock, count: int, near: str = "near"
) -> list[RewardClient[Any]]:
    outcome = [OutcomeRewardConfig(name="icon", type="sprite_icon")]
    breaker = BreakerConfig(failures=2, cool_down_s=10.0)
    config = RewardsConfig(outcome=outcome, breaker=breaker, deadline_s=8.0, attempts=3)
    members: list[ServerRef[Any]] = [ServerRef(server, server.name, server.name) for server in servers]  # type: ignore[arg-type]  # Stand for handles.
    handle: Any = shared
    return [
        RewardClient("orm", lambda: members, config, offset=i, node=near, balancer=lambda: handle, clock=clock)
        for i in range(count)
    ]


def send(server: Any) -> Any:
    return server.send()


async def settled() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


def test_clients_that_ask_at_the_same_moment_share_the_servers_evenly() -> None:
    async def main() -> None:
        servers, shared = [Server("near"), Server("far")], Shared()
        clients = clients_of(servers, shared, Clock(), 9)
        for _ in range(5):
            answers = [asyncio.ensure_future(client.ask(send)) for client in clients]
            await settled()
            assert [len(server.waiting) for server in servers] == [5, 4], "the odd one stays near"
            for server in servers:
                server.answer()
            await asyncio.gather(*answers)
            await settled()
            assert shared.balancer.outstanding() == {}
        assert [server.served for server in servers] == [25, 20]

    asyncio.run(main())


def test_a_server_that_is_slow_gets_no_more_than_the_others_have_and_the_rest_goes_elsewhere() -> None:
    async def main() -> None:
        slow, fast = Server("near"), Server("far")
        clients = clients_of([slow, fast], Shared(), Clock(), 4)
        answers = [asyncio.ensure_future(client.ask(send)) for client in clients]
        for _ in range(20):
            await settled()
            assert len(slow.waiting) <= len(fast.waiting) + 1
            fast.answer(*["fast"] * len(fast.waiting))
            await settled()
            done = [i for i, answer in enumerate(answers) if answer.done()]
            for i in done:
                answers[i] = asyncio.ensure_future(clients[i].ask(send))
        assert fast.served > 4 * slow.served
        await settled()
        for server in (slow, fast):
            server.answer()
        await asyncio.gather(*answers)

    asyncio.run(main())


def test_a_server_behind_an_open_breaker_or_dead_is_not_chosen_however_idle_it_is() -> None:
    async def main() -> None:
        servers, shared, clock = [Server("near"), Server("far")], Shared(), Clock()
        (client,) = clients_of(servers, shared, clock, 1)
        near = ServerRef[Any](servers[0], "near")  # type: ignore[arg-type]  # Stands for a handle.
        for _ in range(2):
            client.breaker.failed(near)
        answers = [asyncio.ensure_future(client.ask(send)) for _ in range(5)]
        await settled()
        assert [len(server.waiting) for server in servers] == [0, 5]
        clock.now += 10.0
        answers += [asyncio.ensure_future(client.ask(send)) for _ in range(3)]
        await settled()
        assert [len(server.waiting) for server in servers] == [1, 7], "one is the probe"
        assert shared.balancer.outstanding() == {"near": 1, "far": 7}
        servers[0].answer()
        client.breaker.failed(near, dead="killed")
        answers += [asyncio.ensure_future(client.ask(send)) for _ in range(2)]
        await settled()
        assert [len(server.waiting) for server in servers] == [0, 9]
        servers[1].answer()
        await asyncio.gather(*answers)

    asyncio.run(main())


def test_an_attempt_that_fails_or_is_given_up_no_longer_counts() -> None:
    async def main() -> None:
        servers, shared = [Server("near"), Server("far")], Shared()
        (client,) = clients_of(servers, shared, Clock(), 1)
        answer = asyncio.ensure_future(client.ask(send))
        await settled()
        servers[0].answer(ActorUnavailableError("restarting", b"0" * 16))
        await settled()
        assert shared.balancer.outstanding() == {"far": 1}
        servers[1].answer()
        assert await answer == "far"
        given_up = asyncio.ensure_future(client.ask(send))
        await settled()
        given_up.cancel()
        await settled()
        assert shared.balancer.outstanding() == {}

    asyncio.run(main())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        yield caplog


def test_without_a_load_balancer_clients_go_by_their_own_requests_and_ask_it_again_later(
    said: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        servers, shared, clock = [Server("near"), Server("far")], Shared(), Clock()
        (client,) = clients_of(servers, shared, clock, 1)
        shared.away = True
        answers = []
        for expected in ([1, 0], [1, 1], [2, 1]):
            answers.append(asyncio.ensure_future(client.ask(send)))
            await settled()
            assert [len(server.waiting) for server in servers] == expected
        assert shared.asked == 1
        assert "going by the own requests" in said.text
        shared.away = False
        clock.now += module.AWAY_S
        answers.append(asyncio.ensure_future(client.ask(send)))
        await settled()
        assert (shared.asked, shared.balancer.outstanding()) == (2, {"near": 1})
        for server in servers:
            server.answer()
        await asyncio.gather(*answers)
        await settled()
        assert shared.balancer.outstanding() == {}

    asyncio.run(main())


def test_a_pool_of_one_asks_nobody() -> None:
    async def main() -> None:
        servers, shared = [Server("near")], Shared()
        (client,) = clients_of(servers, shared, Clock(), 1)
        answer = asyncio.ensure_future(client.ask(send))
        await settled()
        servers[0].answer()
        assert await answer == "near"
        assert shared.asked == 0

    asyncio.run(main())

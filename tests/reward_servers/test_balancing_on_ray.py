"""Clients in processes of their own, one load balancer and unequal servers, all as Ray actors."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.errors import RewardError
from euphonium.wire.arrays import as_array
from euphonium.wire.balancer import LoadBalancer
from euphonium.wire.clients import RewardClient
from euphonium.wire.records import PrmAnswer
from euphonium.wire.roles import Balancer, ServerRef, start_actor
from reward_servers.batching import MicroBatcher
from reward_servers.prm import WHAT, PrmActor, PrmRequest

pytestmark = pytest.mark.ray
PROMPT = "a red car moving left on a white background"
SLOW_S, FAST_S = 0.6, 0.02
CLIENTS, REQUESTS = 4, 12


class UnequalServer(PrmActor):
    """A PRM server on a GPU that is as slow as it is told to be; the nearest one is the slow one."""

    def __init__(self, index: int, config: RunConfig) -> None:
        super().__init__(index, config)
        self.served = self.most = 0
        self.under_way = 0
        self.batcher = MicroBatcher(self.slowly, WHAT, config.pools.prm)

    def slowly(self, requests: Sequence[PrmRequest]) -> list[PrmAnswer | RewardError]:
        time.sleep(SLOW_S if self.index == 0 else FAST_S)
        return self.scorer.score(requests)

    async def reward_and_gradient(self, *arguments: Any) -> PrmAnswer:
        self.served += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await super().reward_and_gradient(*arguments)
        finally:
            self.under_way -= 1

    async def counts(self) -> tuple[int, int]:
        """Requests so far, and the most that there were at once."""
        return self.served, self.most


class Asking:
    """What a rollout actor does with its client, one request at a time."""

    def __init__(self, index: int, config: RunConfig, servers: list[Any], balancer: Any, conditioning: Any) -> None:
        members = [ServerRef(server, f"prm-{i}", "here" if i == 0 else "there") for i, server in enumerate(servers)]
        self.client: RewardClient[Any] = RewardClient(
            "prm", lambda: members, config.rewards, offset=index, node="here", balancer=lambda: balancer
        )
        self.conditioning = conditioning

    def ask(self, x: Any) -> Any:
        return self.client.submit(
            lambda server: server.reward_and_gradient.remote(x, 0.5, self.conditioning, True, PROMPT, 30.0)
        ).result()


@pytest.fixture(scope="module")
def config(tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_recipe_file(
        tmp_path_factory.mktemp("servers"), "pools.prm.wait_ms=0", "rewards.attempts=4", "rewards.deadline_s=60"
    )


@pytest.fixture(scope="module")
def actors(ray_cluster: None, config: RunConfig) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """The load balancer, a slow and a fast server, and their clients."""
    balancer = start_actor(Balancer, LoadBalancer, {"num_cpus": 0, "max_restarts": -1})
    serve = ray.remote(UnequalServer).options(num_cpus=0.1, max_restarts=0)
    servers = [serve.remote(index, config) for index in range(2)]
    encoded = RolloutWorker(config, torch.device("cpu")).conditioning(PROMPT)
    conditioning = {name: as_array(tensor) for name, tensor in encoded.items()}
    client = ray.remote(Asking).options(num_cpus=0.1)
    clients = [client.remote(i, config, servers, balancer, conditioning) for i in range(CLIENTS)]
    ray.get([server.ready.remote() for server in servers], timeout=120)
    yield balancer, servers, clients
    for actor in (*clients, *servers, balancer):
        ray.kill(actor)


def states() -> Any:
    return np.random.default_rng(0).standard_normal((1, 16, 5, 4, 4), dtype=np.float32)


def ask_all(clients: list[Any], between: Callable[[int], None] = lambda done: None) -> list[Any]:
    """Every client asks again as soon as it has its answer; all answers."""
    x, answers = ray.put(states()), []
    left = dict.fromkeys(range(len(clients)), REQUESTS - 1)
    under_way = {client.ask.remote(x): i for i, client in enumerate(clients)}
    while under_way:
        (ready, *_), _ = ray.wait(list(under_way), num_returns=1, timeout=60)
        answers.append(ray.get(ready))
        index = under_way.pop(ready)
        between(len(answers))
        if left[index]:
            left[index] -= 1
            under_way[clients[index].ask.remote(x)] = index
    return answers


def test_clients_that_know_nothing_of_each_other_leave_a_slow_server_of_their_own_node_alone(
    actors: tuple[Any, list[Any], list[Any]],
) -> None:
    balancer, servers, clients = actors
    answers = ask_all(clients)
    assert len(answers) == CLIENTS * REQUESTS
    np.testing.assert_allclose([rewards[0] for rewards, _ in answers], answers[0][0][0], atol=1e-6)
    (slow, most), (fast, _) = ray.get([server.counts.remote() for server in servers])
    assert slow + fast == CLIENTS * REQUESTS
    assert fast > 2 * slow, (slow, fast)
    assert most < CLIENTS
    assert ray.get(balancer.outstanding.remote(), timeout=10) == {}


def test_requests_go_on_when_the_load_balancer_or_a_server_dies(actors: tuple[Any, list[Any], list[Any]]) -> None:
    balancer, servers, clients = actors

    def between(done: int) -> None:
        if done == 8:
            ray.kill(balancer, no_restart=False)
        if done == 20:
            ray.kill(servers[1])

    before, _ = ray.get(servers[0].counts.remote())
    assert len(ask_all(clients, between)) == CLIENTS * REQUESTS
    assert ray.get(balancer.outstanding.remote(), timeout=30) == {}
    after, _ = ray.get(servers[0].counts.remote())
    assert after - before >= CLIENTS * REQUESTS - 20

"""Reward servers as Ray actors: merged gradients over the wire, and servers that are killed under load."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from actors.prm_client import PrmClient
from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.wire.clients import RewardClient
from euphonium.wire.records import PrmAnswer
from euphonium.wire.roles import ServerRef
from reward_servers.batching import MicroBatcher
from reward_servers.prm import WHAT, PrmActor, PrmRequest, PrmScorer

pytestmark = pytest.mark.ray
CPU = torch.device("cpu")
PROMPTS = ["a red car moving left on a white background", "a blue fish", "a green frog moving up"]
RESTARTS = 1


class TestServer(PrmActor):
    """A PRM server whose process can be named to the killer, and which counts."""

    __test__ = False

    def __init__(self, index: int, config: RunConfig) -> None:
        super().__init__(index, config)
        self.counts = {"requests": 0, "passes": 0}
        self.batcher = MicroBatcher(self.counted, WHAT, config.pools.prm)

    def counted(self, requests: Sequence[PrmRequest]) -> list[PrmAnswer | RewardError]:
        self.counts["passes"] += 1
        return self.scorer.score(requests)

    async def reward_and_gradient(self, *arguments: Any) -> PrmAnswer:
        self.counts["requests"] += 1
        return await super().reward_and_gradient(*arguments)

    async def counts_so_far(self) -> dict[str, int]:
        return self.counts

    async def pid(self) -> int:
        return os.getpid()


class Client:
    """What a rollout actor does: asks again and again, each time about other states."""

    def __init__(self, index: int, servers: RewardClient, worker: RolloutWorker, scorer: PrmScorer) -> None:
        self.rng = np.random.default_rng(index)
        self.prompt = PROMPTS[index % len(PROMPTS)]
        self.conditioning = worker.conditioning(self.prompt)
        self.table: StepTable = worker.table()
        self.client = PrmClient(servers, self.conditioning, self.table, self.prompt)
        self.scorer = scorer
        self.outcomes: list[Any] = []

    def ask(self, k: int, *, spoil: bool = False) -> tuple[torch.Tensor, Any]:
        x = torch.from_numpy(self.rng.standard_normal((2, 16, 5, 4, 4), dtype=np.float32))
        if spoil:
            x[1, 0] = float("nan")
        return x, self.client.submit(k, x, with_gradient=True)

    def check(self, k: int, x: torch.Tensor, answer: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        arrays = {name: tensor.numpy() for name, tensor in self.conditioning.items()}
        rewards, gradient = self.scorer.reward_and_gradient(x.numpy(), float(self.table.sigmas[k]), arrays, True)
        np.testing.assert_allclose(answer[0].numpy(), rewards, atol=1e-6, rtol=0)
        assert gradient is not None
        assert answer[1] is not None
        np.testing.assert_allclose(answer[1].numpy(), gradient, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def config(tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_recipe_file(
        tmp_path_factory.mktemp("servers"), "pools.prm.wait_ms=20", "rewards.attempts=4", "rewards.deadline_s=30",
        "rewards.breaker.cool_down_s=2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def servers(ray_cluster: None, config: RunConfig) -> Iterator[list[Any]]:
    import ray

    make = ray.remote(TestServer).options(num_cpus=0.1, max_restarts=RESTARTS, max_task_retries=0)
    handles = [make.remote(index, config) for index in range(2)]
    ray.get([handle.ready.remote() for handle in handles], timeout=120)
    yield handles
    for handle in handles:
        ray.kill(handle)


@pytest.fixture(scope="module")
def make_client(config: RunConfig, servers: list[Any]) -> Callable[[int], Client]:
    worker, scorer = RolloutWorker(config, CPU), PrmScorer(config, CPU)

    def make(index: int) -> Client:
        members = [ServerRef(server, f"prm-{i}") for i, server in enumerate(servers)]
        pool = RewardClient("prm", lambda: members, config.rewards, offset=index)
        return Client(index, pool, worker, scorer)

    return make


def test_requests_of_several_clients_are_merged_and_their_gradients_are_right(
    servers: list[Any], make_client: Callable[[int], Client]
) -> None:
    import ray

    before = ray.get([server.counts_so_far.remote() for server in servers], timeout=30)
    clients = [make_client(index) for index in range(6)]
    for k in (0, 2):
        asked = [client.ask(k, spoil=index == 3 and k == 2) for index, client in enumerate(clients)]
        for index, (client, (x, answer)) in enumerate(zip(clients, asked, strict=True)):
            if index == 3 and k == 2:
                with pytest.raises(NonFiniteRewardError, match=client.prompt):
                    answer.result()
            else:
                client.check(k, x, answer.result())
    after = ray.get([server.counts_so_far.remote() for server in servers], timeout=30)
    requests = sum(a["requests"] - b["requests"] for a, b in zip(after, before, strict=True))
    passes = sum(a["passes"] - b["passes"] for a, b in zip(after, before, strict=True))
    # The bad request was asked once: its error is not tried again, and does not count against its server.
    assert requests == 12
    # The pass that it spoilt was followed by one for it alone.
    assert passes <= 6 + 1


def test_every_request_is_answered_once_or_fails_with_a_typed_error_while_servers_are_killed(
    servers: list[Any], make_client: Callable[[int], Client]
) -> None:
    """Both servers are killed at random moments, until one of them has used up its restarts."""
    import ray

    clients, done = [make_client(index) for index in range(4)], threading.Event()

    def work(client: Client) -> None:
        while not done.is_set():
            k = len(client.outcomes) % 4
            x, answer = client.ask(k)
            try:
                result = answer.result()
            except RewardError as error:
                client.outcomes.append(error)
            else:
                client.outcomes.append((k, x, result))
            time.sleep(0.05)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    rng, began = random.Random(0), time.monotonic()
    for thread in threads:
        thread.start()
    for victim in (0, 1, 0):
        time.sleep(0.3 + rng.random())
        kill(servers[victim])
    # The survivor answers everybody, whether they knew the dead one or not.
    served = [len(client.outcomes) for client in clients]
    deadline = time.monotonic() + 60
    while any(len(c.outcomes) < n + 4 for c, n in zip(clients, served, strict=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    done.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for client, before in zip(clients, served, strict=True):
        assert len(client.outcomes) >= before + 4
        # Its own answer, not that of another request that shared a pass or a dead server with it.
        for outcome in client.outcomes:
            if not isinstance(outcome, RewardError):
                client.check(*outcome)
        assert not isinstance(client.outcomes[-1], RewardError)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(servers[0].ready.remote(), timeout=10)
    assert time.monotonic() - began < 150


def kill(server: Any) -> None:
    """Kills a server's process, once it is there to be killed."""
    import ray

    deadline = time.monotonic() + 60
    while True:
        try:
            pid = ray.get(server.pid.remote(), timeout=30)
            break
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)


def test_a_pool_that_is_gone_is_an_error_within_the_deadline(
    servers: list[Any], make_client: Callable[[int], Client]
) -> None:
    import ray

    for server in servers:
        ray.kill(server)
    client, began = make_client(0), time.monotonic()
    with pytest.raises(RewardError, match=r"all 2 servers of the prm pool are dead.*pools\.prm") as caught:
        client.ask(0)[1].result()
    assert time.monotonic() - began < 30
    assert caught.value.rewards == ("process",)

"""Throughput of two unequal PRM servers under three ways of choosing between them.

    python benchmarks/reward_balancing.py [--clients 4] [--seconds 10] [--turns 3] [--slow-ms 200] [--fast-ms 20]

Each client is a process that does what a rollout actor does: it asks for rewards and gradients of two states, waits for
the answer, and asks again. One server is slow and, as its reference says, on the clients' node, the other one is fast
and on another node; both are the real actor around a process reward model of the embedded generator, with a sleep
before every pass, which does not occupy the machine. The clients choose

- ``nearest``: a server of their own node as long as it answers, here always the slow one;
- ``own requests``: the one with the fewest outstanding requests of the client itself, which has none when it asks;
- ``all requests``: the one with the fewest outstanding requests of all clients, by the load balancer.

Ways are measured in turns; what counts is the ratio of their medians. ``choice_ms`` is the median time until a request
was sent, which is what the load balancer costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import ray
import torch
from reward_serving import PROMPTS, config_of, model_of

from euphonium.config import RunConfig
from euphonium.errors import RewardError
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from euphonium.wire.balancer import LoadBalancer
from euphonium.wire.clients import RewardClient
from euphonium.wire.records import PrmAnswer
from euphonium.wire.roles import Balancer, ServerRef, start_actor
from reward_servers.batching import MicroBatcher
from reward_servers.prm import WHAT, PrmActor, PrmRequest

SAMPLES = 2
# Which of the servers (slow and near, fast and far) a client knows of, and whether it asks the load balancer.
WAYS = {"nearest": (1, False), "own requests": (2, False), "all requests": (2, True)}


class UnequalServer(PrmActor):
    """A PRM server whose passes take longer than they need."""

    def __init__(self, index: int, config: RunConfig, extra_s: float) -> None:
        super().__init__(index, config)
        self.extra_s = extra_s
        self.batcher = MicroBatcher(self.slowly, WHAT, config.pools.prm)

    def slowly(self, requests: Sequence[PrmRequest]) -> list[PrmAnswer | RewardError]:
        """Scores requests, later than it could."""
        time.sleep(self.extra_s)
        return self.scorer.score(requests)


class Client:
    """Asks again and again."""

    def __init__(self, index: int, config: RunConfig, servers: list[Any], balancer: Any, conditioning: Any) -> None:
        self.rng = np.random.default_rng(index)
        self.shape = (SAMPLES, *open_generator(config.model).latent_shape)
        self.conditioning, self.deadline_s = conditioning, config.rewards.deadline_s
        members = [ServerRef(server, f"prm-{i}", "here" if i == 0 else "there") for i, server in enumerate(servers)]
        self.clients: dict[str, RewardClient[Any]] = {
            way: RewardClient(
                "prm",
                lambda known=known: members[:known],  # type: ignore[misc]  # A default binds the loop's value.
                config.rewards,
                offset=index,
                node="here",
                balancer=lambda asks=asks: balancer if asks else None,  # type: ignore[misc]
            )
            for way, (known, asks) in WAYS.items()
        }

    def work(self, way: str, seconds: float) -> tuple[list[float], list[float]]:
        """Seconds that each request took, and those until it was sent."""
        latencies, choices = [], []
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            x = ray.put(self.rng.standard_normal(self.shape, dtype=np.float32))
            asked = time.perf_counter()
            answer = self.clients[way].submit(
                lambda server, x=x: server.reward_and_gradient.remote(  # type: ignore[misc]
                    x, 0.5, self.conditioning, True, PROMPTS[0], self.deadline_s
                )
            )
            choices.append(time.perf_counter() - asked)
            answer.result()
            latencies.append(time.perf_counter() - began)
        return latencies, choices


def measure(clients: list[Any], way: str, seconds: float) -> dict[str, float]:
    began = time.perf_counter()
    results = ray.get([client.work.remote(way, seconds) for client in clients])
    took = time.perf_counter() - began
    latencies = [latency for one, _ in results for latency in one]
    return {
        "requests_per_s": len(latencies) / took,
        "latency_ms": 1000 * statistics.median(latencies),
        "choice_ms": 1000 * statistics.median(choice for _, one in results for choice in one),
    }


def compare(clients: list[Any], seconds: float, turns: int) -> None:
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in WAYS:
        measure(clients, way, 1.0)
    for _ in range(turns):
        for way, measured in results.items():
            measured.append(measure(clients, way, seconds / turns))
    medians = {
        way: {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
        for way, measured in results.items()
    }
    for way, values in medians.items():
        ratio = values["requests_per_s"] / medians["nearest"]["requests_per_s"]
        numbers = {key: round(value, 2) for key, value in (values | {"ratio": ratio}).items()}
        print(json.dumps({"clients": len(clients), "way": way, **numbers}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4], help="processes that ask")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measurement, for each way")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--slow-ms", type=float, default=200.0, help="sleep of the near server before a pass")
    parser.add_argument("--fast-ms", type=float, default=20.0, help="sleep of the far one")
    options = parser.parse_args()

    family = open_generator(model_of())
    conditioning = {
        name: tensor.numpy() for name, tensor in family.prompt_encoder(torch.device("cpu"))(PROMPTS[:1]).items()
    }
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ProcessRewardModel.from_generator(family, 1).save(Path(folder))
            config = config_of(Path(folder), max_batch=4 * SAMPLES, wait_ms=0.0, threads=1)
            balancer = start_actor(Balancer, LoadBalancer, {"num_cpus": 0})
            serve = ray.remote(UnequalServer).options(num_cpus=0.1)
            sleeps = (options.slow_ms / 1000, options.fast_ms / 1000)
            servers = [serve.remote(i, config, extra_s) for i, extra_s in enumerate(sleeps)]
            ray.get([server.ready.remote() for server in servers], timeout=300)
            client = ray.remote(Client).options(num_cpus=0.1)
            clients = [client.remote(i, config, servers, balancer, conditioning) for i in range(max(options.clients))]
            print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {ray.__version__=}, {torch.__version__=}")
            for count in options.clients:
                compare(clients[:count], options.seconds, options.turns)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()

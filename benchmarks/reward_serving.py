"""Throughput of one PRM server that merges requests, against the same server answering them one by one.

    python benchmarks/reward_serving.py [--clients 8] [--samples 1 4] [--seconds 6] [--blocks 3] [--threads 1]

A process reward model of the embedded generator (fresh head; speed does not depend on it) is served by the real Ray
actor. Each client is a thread that does what a rollout actor does: it asks for rewards and gradients of a group's
states and waits for the answer, again and again. All servers are up at once and are measured in turns, several times
each, so that whatever else the machine does falls on all; what counts is the ratio of their medians. On a machine that
is not otherwise idle, the processor time that the server spends on a sample is the steadier number: its ratio is given
beside that of the throughput.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import ray
import torch

from euphonium.config import ModelConfig, RunConfig
from euphonium.errors import RewardError
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from euphonium.wire.records import PrmAnswer
from reward_servers.batching import MicroBatcher
from reward_servers.prm import WHAT, PrmActor, PrmRequest

GENERATOR = Path(__file__).parent.parent / "euphonium" / "embedded" / "weights"
PROMPTS = [
    "a red car moving left on a white background",
    "a blue fish moving up on a gray background",
    "a green frog moving right on a blue background",
    "a red heart moving down on a black background",
]
TURNS = 6


def config_of(folder: Path, *, max_batch: int, wait_ms: float, threads: int) -> RunConfig:
    pool = {"max_batch": max_batch, "wait_ms": wait_ms, "threads": threads}
    return RunConfig.model_validate({
        "name": "reward-serving",
        "iterations": 1,
        "model": model_of().model_dump(),
        "prompts": {"train": "unused.txt", "evaluation": "unused.txt"},
        "sampler": {"eta": 0.5, "num_steps": 10, "shift": 3.0},
        "rollout": {"prompts_per_iteration": 1, "group_size": 2},
        "rewards": {"outcome": [{"name": "icon", "type": "sprite_icon"}], "process": {"path": str(folder)}},
        "optimizer": {"learning_rate": 1e-4},
        "pools": {"prm": pool},
    })  # fmt: skip


def model_of() -> ModelConfig:
    return ModelConfig(path=str(GENERATOR), frames=9, height=32, width=32, max_prompt_tokens=32)


class MeasuredServer(PrmActor):
    """A PRM server that says what it has computed, and how much processor time that took."""

    def __init__(self, index: int, config: RunConfig) -> None:
        super().__init__(index, config)
        self.passes = self.samples = 0
        self.batcher = MicroBatcher(self.counted, WHAT, config.pools.prm)

    def counted(self, requests: Sequence[PrmRequest]) -> list[PrmAnswer | RewardError]:
        """Scores requests, and counts them."""
        self.passes += 1
        self.samples += sum(request.size for request in requests)
        return self.scorer.score(requests)

    async def counts(self) -> tuple[int, int]:
        """Passes and samples so far."""
        return self.passes, self.samples

    async def cpu_s(self) -> float:
        """Seconds of all threads of its process."""
        return time.process_time()


class Client(threading.Thread):
    """Asks one server until told to stop."""

    def __init__(self, server: Any, conditioning: Any, shape: tuple[int, ...], seed: int, until: float) -> None:
        super().__init__()
        self.server, self.conditioning, self.until = server, conditioning, until
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.latencies: list[float] = []

    def run(self) -> None:
        """See :class:`threading.Thread`."""
        while (began := time.perf_counter()) < self.until:
            x = self.rng.standard_normal(self.shape, dtype=np.float32)
            call = self.server.reward_and_gradient.remote(x, float(self.rng.uniform(0.1, 1.0)), self.conditioning, True)
            ray.get(call, timeout=120)
            self.latencies.append(time.perf_counter() - began)


def measure(server: Any, conditionings: list[Any], clients: int, samples: int, seconds: float) -> dict[str, float]:
    (passes, done), cpu = ray.get([server.counts.remote(), server.cpu_s.remote()])
    shape = (samples, *open_generator(model_of()).latent_shape)
    began = time.perf_counter()
    threads = [Client(server, conditionings[i % len(conditionings)], shape, i, began + seconds) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    (passes_after, done_after), cpu_after = ray.get([server.counts.remote(), server.cpu_s.remote()])
    latencies = [latency for thread in threads for latency in thread.latencies]
    return {
        "samples_per_s": len(latencies) * samples / took,
        "cpu_ms_per_sample": 1000 * (cpu_after - cpu) / (len(latencies) * samples),
        "latency_ms": 1000 * statistics.median(latencies),
        "samples_per_pass": (done_after - done) / (passes_after - passes),
    }


def compare(servers: dict[str, Any], conditionings: list[Any], clients: int, samples: int, seconds: float) -> None:
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for _ in range(TURNS):
        for name, server in servers.items():
            turns[name].append(measure(server, conditionings, clients, samples, seconds / TURNS))
    medians = {
        name: {key: statistics.median(turn[key] for turn in results) for key in results[0]}
        for name, results in turns.items()
    }
    single = medians["one by one"]
    for name, values in medians.items():
        ratios = {
            "ratio": values["samples_per_s"] / single["samples_per_s"],
            "cpu_ratio": single["cpu_ms_per_sample"] / values["cpu_ms_per_sample"],
        }
        numbers = {key: round(value, 2) for key, value in (values | ratios).items()}
        print(json.dumps({"clients": clients, "samples": samples, "server": name, **numbers}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="concurrent clients")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="samples in a request")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measurement, for each server and setting")
    parser.add_argument("--blocks", type=int, default=3, help="of the generator's transformer in the model's trunk")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a server")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--wait-ms", type=float, nargs="+", default=[0.0, 2.0])
    options = parser.parse_args()

    family = open_generator(model_of())
    encode = family.prompt_encoder(torch.device("cpu"))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ProcessRewardModel.from_generator(family, options.blocks).save(Path(folder))
            make = ray.remote(MeasuredServer).options(num_cpus=0.1)

            def serve(max_batch: int, wait_ms: float) -> Any:
                return make.remote(
                    0, config_of(Path(folder), max_batch=max_batch, wait_ms=wait_ms, threads=options.threads)
                )

            # A pass that has room for one request only is what makes a server answer one by one.
            single = {samples: serve(samples, 0.0) for samples in options.samples}
            merging = {f"merged, wait {wait:g} ms": serve(options.max_batch, wait) for wait in options.wait_ms}
            conditionings = [
                ray.put({name: tensor.numpy() for name, tensor in encode([prompt]).items()}) for prompt in PROMPTS
            ]
            for server in [*single.values(), *merging.values()]:
                ray.get(server.ready.remote(), timeout=300)
                measure(server, conditionings, 2, 1, 0.5)
            print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {ray.__version__=}, {torch.__version__=}")
            for samples in options.samples:
                for clients in options.clients:
                    servers = {"one by one": single[samples], **merging}
                    compare(servers, conditionings, clients, samples, options.seconds)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()

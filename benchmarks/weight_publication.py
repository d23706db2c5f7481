"""What it costs to get new weights to the rollout actors, against copying the same bytes in memory.

    python benchmarks/weight_publication.py --mb 512 --receivers 1 2 4

Publishes float32 tensors the way the learner does and has receivers take them over the way rollout actors do, all at
the same time: through the object store (buckets of them, whose references the weight store gives out; fetch, copy into
the module's tensors, checksum) and by a broadcast in a group of their own (gloo here). The yardstick is one
``tensor.copy_`` of the same bytes in this process, in the same run. Medians; the first publications are left out, in
which the object store touches its memory for the first time (RAY_preallocate_plasma_memory=1 has it done at the start).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
import torch
from torch import Tensor

from euphonium.config import PoolsConfig
from euphonium.wire.records import WeightOrder
from euphonium.wire.roles import RolloutContext
from euphonium.wire.weights.follower import WeightFollower
from euphonium.wire.weights.manifest import load_tensors, split_into_buckets
from euphonium.wire.weights.sender import BroadcastSender, ObjectStoreSender, Publication
from euphonium.wire.weights.store import KEPT_VERSIONS, WeightStore

TENSOR = 1 << 22
TIMEOUT_S = 120.0
POOLS = PoolsConfig(start_timeout_s=TIMEOUT_S)
# Histories: what came by broadcast must be pulled all the same.
PULLED, BROADCAST = 0, 1
CPU = torch.device("cpu")


class Receiver:
    """Holds tensors and follows published ones as a rollout actor does."""

    def __init__(self, store: Any, count: int) -> None:
        torch.set_num_threads(1)
        self.tensors = {f"t{i}": torch.zeros(TENSOR) for i in range(count)}
        self.weights = WeightFollower(store, self.load, CPU, POOLS)

    def load(self, _version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies them, as a policy does."""
        load_tensors(tensors, self.tensors)

    def holds(self) -> float:
        """A number of the weights."""
        return float(self.tensors["t0"][0])

    def pull(self, version: int) -> None:
        """Takes over a version from the object store."""
        self.weights.follow(RolloutContext(version=version, history=PULLED))

    def receive(self, order: WeightOrder) -> None:
        """Takes over a version from a broadcast."""
        self.weights.receive(order)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copied(tensors: dict[str, Tensor]) -> float:
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return seconds(lambda: [target[name].copy_(tensor) for name, tensor in tensors.items()])


def measure(receivers: int, tensors: dict[str, Tensor], bucket_bytes: int, repeats: int) -> dict[str, float]:
    """Seconds per gigabyte for so many receivers."""
    names = [f"receiver-{i}" for i in range(receivers)]
    store = ray.remote(WeightStore).options(num_cpus=0).remote()
    make = ray.remote(Receiver).options
    actors = [make(name=name, num_cpus=0).remote(store, len(tensors)) for name in names]
    ray.get([actor.holds.remote() for actor in actors])
    nbytes = {name: tensor.nbytes for name, tensor in tensors.items()}
    parts = [{name: tensors[name] for name in part} for part in split_into_buckets(nbytes, bucket_bytes)]
    object_store, broadcaster = ObjectStoreSender(store, TIMEOUT_S), BroadcastSender(TIMEOUT_S, CPU)
    rows = []
    for version in range(1, 1 + KEPT_VERSIONS + repeats):
        pulled = Publication(version=version, kind="policy", history=PULLED)
        pushed = Publication(version=version, kind="policy", history=BROADCAST, receivers=tuple(names))

        def publish(publication: Publication = pulled) -> None:
            object_store.send(publication, parts)

        def pull(version: int = version) -> None:
            ray.get([actor.pull.remote(version) for actor in actors])

        def broadcast(publication: Publication = pushed) -> None:
            broadcaster.announce(publication)
            broadcaster.send(publication, parts)

        row = [copied(tensors)]
        for sign, works in ((1, (publish, pull)), (-1, (broadcast,))):
            for tensor in tensors.values():
                tensor.fill_(sign * version)
            row += [seconds(work) for work in works]
            assert ray.get([actor.holds.remote() for actor in actors]) == [sign * version] * receivers
        rows.append(row)
    for actor in [*actors, store]:
        ray.kill(actor)
    gigabytes = sum(nbytes.values()) / 1e9
    copy, put, pull_all, sent = (
        statistics.median(column) / gigabytes for column in zip(*rows[KEPT_VERSIONS:], strict=True)
    )
    return {
        "receivers": receivers, "GB": gigabytes, "copy_s_per_GB": copy, "publish_s_per_GB": put,
        "pull_all_s_per_GB": pull_all, "object_store_over_copy": (put + pull_all) / copy, "collective_s_per_GB": sent,
        "collective_over_copy": sent / copy,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=512, help="size of the policy")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = max(1, options.mb * 2**20 // (TENSOR * 4))
    tensors = {f"t{i}": torch.zeros(TENSOR) for i in range(count)}
    ray.init(log_to_driver=False, logging_level="ERROR", namespace="publication", include_dashboard=False)
    for receivers in options.receivers:
        result = measure(receivers, tensors, options.bucket_mb * 2**20, options.repeats)
        print(json.dumps({name: round(value, 3) for name, value in result.items()}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

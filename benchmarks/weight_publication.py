"""What it costs to get new weights to the rollout actors, against copying the same bytes in memory.

    python benchmarks/weight_publication.py --mb 512 --receivers 1 2 4

Publishes float32 tensors the way the learner does (buckets into the object store, their references to the weight
store) and has receivers take them over the way rollout actors do (fetch, checksum, copy into the module's tensors), all
at the same time. The yardstick is one ``tensor.copy_`` of the same bytes in this process, in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import ray
import torch

from core.weights import WeightManifest, load_buckets, pack, split_into_buckets
from orchestrator.weight_store import WeightStore

TENSOR = 1 << 22


class Receiver:
    """Holds tensors and takes over published ones."""

    def __init__(self, store: Any, count: int) -> None:
        torch.set_num_threads(1)
        self.store = store
        self.tensors = {f"t{i}": torch.zeros(TENSOR) for i in range(count)}

    def ready(self) -> bool:
        """Answers once it is there."""
        return True

    def pull(self, version: int) -> float:
        """Takes over a version, and returns the seconds that it took."""
        began = time.perf_counter()
        manifest, refs = ray.get(self.store.fetch.remote(version, "policy"))
        load_buckets(manifest, ray.get(refs), self.tensors)
        assert float(self.tensors["t0"][0]) == version
        return time.perf_counter() - began


def publish(store: Any, tensors: dict[str, torch.Tensor], version: int, bucket_bytes: int) -> float:
    began = time.perf_counter()
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    pending, manifests = [], []
    for index, names in enumerate(split_into_buckets(sizes, bucket_bytes)):
        data, manifest = pack({name: tensors[name] for name in names})
        pending.append(store.put_bucket.remote(version, "policy", index, [ray.put(data)], keep=False))
        manifests.append(manifest)
    ray.get(pending)
    ray.get(store.commit.remote(WeightManifest(version=version, kind="policy", buckets=tuple(manifests))))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=512, help="size of the policy")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = max(1, options.mb * 2**20 // (TENSOR * 4))
    tensors = {f"t{i}": torch.zeros(TENSOR) for i in range(count)}
    gigabytes = count * TENSOR * 4 / 1e9
    ray.init(log_to_driver=False, logging_level="ERROR")
    store = ray.remote(WeightStore).options(num_cpus=0).remote()
    version = 0
    for receivers in options.receivers:
        actors = [ray.remote(Receiver).options(num_cpus=0).remote(store, count) for _ in range(receivers)]
        ray.get([actor.ready.remote() for actor in actors])
        rows = []
        for _ in range(options.repeats):
            version += 1
            for tensor in tensors.values():
                tensor.fill_(version)
            target = {name: torch.empty_like(t).fill_(0) for name, t in tensors.items()}
            began = time.perf_counter()
            for name, tensor in tensors.items():
                target[name].copy_(tensor)
            copied = time.perf_counter() - began
            del target
            published = publish(store, tensors, version, options.bucket_mb * 2**20)
            began = time.perf_counter()
            ray.get([actor.pull.remote(version) for actor in actors])
            rows.append((copied, published, time.perf_counter() - began))
        copied, published, pulled = (sorted(row[i] for row in rows)[len(rows) // 2] for i in range(3))
        result = {
            "receivers": receivers, "GB": gigabytes, "copy_s_per_GB": copied / gigabytes,
            "publish_s_per_GB": published / gigabytes, "pull_all_s_per_GB": pulled / gigabytes,
            "publish_and_pull_over_copy": (published + pulled) / copied,
        }  # fmt: skip
        print(json.dumps({name: round(value, 3) for name, value in result.items()}), flush=True)
        for actor in actors:
            ray.kill(actor)
    ray.shutdown()


if __name__ == "__main__":
    main()

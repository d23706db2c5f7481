"""Part ``publication`` of gpu_suite.py: how fast all weights move on the GPU, by way of the CPU, and between GPUs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from gpu_suite_tools import Record, Values, release, timed
from guided_step_measures import GIB

from learners.engine.engine import BUCKET

# Bytes of the published transformer's weights in bfloat16.
WEIGHTS = 25_641_000_000


class Buckets:
    """Weights cut into buckets on one device, a place for them to go, and host memory in between."""

    def __init__(self, device: torch.device, count: int, size: int) -> None:
        self.source, self.target = (
            [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(count)] for _ in range(2)
        )
        pinned = device.type == "cuda"
        self.host = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.gib = count * size / GIB

    def copy(self) -> None:
        """On the device."""
        for there, here in zip(self.target, self.source, strict=True):
            there.copy_(here)

    def out(self) -> None:
        """To pinned host memory."""
        for i, here in enumerate(self.source):
            self.host[i % 2].copy_(here, non_blocking=True)

    def back(self) -> None:
        """From pinned host memory."""
        for i, there in enumerate(self.target):
            there.copy_(self.host[i % 2], non_blocking=True)

    def out_and_back(self) -> None:
        """Both, on one stream, which keeps their order."""
        for i, (there, here) in enumerate(zip(self.target, self.source, strict=True)):
            self.host[i % 2].copy_(here, non_blocking=True)
            there.copy_(self.host[i % 2], non_blocking=True)

    def pageable(self) -> None:
        """Both, by way of ordinary host memory."""
        for there, here in zip(self.target, self.source, strict=True):
            there.copy_(here.cpu())


def publication(record: Record) -> None:
    """Copies of the generator's weights in buckets, in all these ways."""
    device = record.device
    size, count = (BUCKET // 256, 4) if record.small else (BUCKET, -(-WEIGHTS // BUCKET))
    buckets = Buckets(device, count, size)
    ways = {
        "GPU to GPU, the same one": buckets.copy,
        "GPU to pinned memory": buckets.out,
        "pinned memory to GPU": buckets.back,
        "GPU to pinned memory and back": buckets.out_and_back,
        "GPU to pageable memory and back": buckets.pageable,
    }
    gib = buckets.gib
    for name, way in ways.items():
        record.measure(name, lambda w=way: copied(w, gib, device))
    del buckets, ways, way
    release(device)
    name = "broadcast between two processes"
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        record.skip(name, f"NCCL needs a GPU a process, and there is {torch.cuda.device_count()}")
    else:
        record.measure(name, lambda: broadcast(count, size, device.type))


def copied(way: Callable[[], None], gib: float, device: torch.device) -> Values:
    """Time and rate of a way of copying."""
    values = timed(way, device, repeats=2, count=False)
    return values | {"gib": gib, "gib_per_s": gib / float(values["seconds"] or 1)}


def broadcast(count: int, bucket: int, kind: str) -> Values:
    """Broadcasts buckets from one process to another, by NCCL between GPUs, by gloo between CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_broadcaster, args=(folder, count, bucket, kind), nprocs=2)
        seconds = float((Path(folder) / "seconds").read_text())
    return {"seconds": seconds, "gib": count * bucket / GIB, "gib_per_s": count * bucket / GIB / seconds}


def _broadcaster(rank: int, folder: str, count: int, bucket: int, kind: str) -> None:
    import torch.distributed as dist

    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    tensors = [torch.full((bucket,), 1 - rank, dtype=torch.uint8, device=device) for _ in range(count)]
    dist.broadcast(tensors[0], src=0)
    dist.barrier()
    began = time.perf_counter()
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
    if kind == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    seconds = time.perf_counter() - began
    if not all(bool((tensor[:16] == 1).all()) for tensor in tensors):
        raise RuntimeError("what was broadcast did not arrive")
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(seconds))
    dist.destroy_process_group()

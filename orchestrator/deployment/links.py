"""The doctor's measurements between nodes: an all-reduce as the learner's ranks do it, and an object that every node
fetches as rollout actors fetch weights.

The ranks wait for each other, the driver for all of them, at most ``LINK_TIMEOUT_S``.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.deployment.findings import Finding, judged
from orchestrator.pools.ray_session import one_line

if TYPE_CHECKING:
    import numpy as np
    from ray import ObjectRef

LINK_TIMEOUT_S = 60.0
MEGABYTES = 64
GPU = "GPU"


def measure_links(nodes: Mapping[str, Mapping[str, float]], *, on_gpus: bool) -> list[Finding]:
    """Measures an all-reduce and the way of an object.

    Args:
        nodes: resources of each node by its id.
        on_gpus: whether ranks take a GPU each and talk through NCCL, else gloo.
    """
    members = [node for node, resources in nodes.items() if not on_gpus or resources.get(GPU, 0) >= 1]
    if len(members) == 1 and (not on_gpus or nodes[members[0]].get(GPU, 0) >= 2):
        members *= 2
    return [_all_reduce(members, on_gpus=on_gpus), _transfer(list(nodes))]


def _all_reduce(members: Sequence[str], *, on_gpus: bool) -> Finding:
    import ray

    name = f"{'NCCL' if on_gpus else 'gloo'} all-reduce"
    if len(members) < 2:
        return Finding(name, "cluster", "WARN", "fewer than two GPUs: not measured", "add a node, or look at it later")
    free = ray.available_resources().get(GPU, 0.0)
    if on_gpus and free < len(members):
        return Finding(
            name, "cluster", "WARN", f"{free:g} of {len(members)} GPUs are free: not measured",
            "look again when the jobs that hold them have ended",
        )  # fmt: skip
    task = ray.remote(num_cpus=0, num_gpus=1 if on_gpus else 0, max_retries=0)(_rank)
    meeting = ray.remote(num_cpus=0)(_free_place)
    try:
        place = ray.get(meeting.options(scheduling_strategy=_on(members[0])).remote(), timeout=LINK_TIMEOUT_S)
        ranks = [
            task.options(scheduling_strategy=_on(node)).remote(place, rank, len(members), on_gpus)
            for rank, node in enumerate(members)
        ]
        done, waiting = ray.wait(ranks, num_returns=len(ranks), timeout=LINK_TIMEOUT_S)
        if waiting:
            for rank in waiting:
                ray.cancel(rank, force=True)
            return Finding(
                name, "cluster", "FAIL", f"{len(waiting)} of {len(members)} ranks did not come within "
                f"{LINK_TIMEOUT_S:.0f} s",
                "open the ports between the nodes, and name the right network in NCCL_SOCKET_IFNAME or "
                "GLOO_SOCKET_IFNAME",
            )  # fmt: skip
        slowest = max(ray.get(done))
    except Exception as error:  # whatever the collective library raises is the finding
        return Finding(
            name, "cluster", "FAIL", one_line(error),
            "see the error of the rank in Ray's dashboard; NCCL_DEBUG=INFO on the nodes says more",
        )  # fmt: skip
    speed = MEGABYTES / 1000 / slowest
    return Finding(
        name, "cluster", "PASS", f"{len(members)} ranks, {MEGABYTES} MB in {slowest:.2f} s, {speed:.2f} GB/s"
    )


def _free_place() -> str:
    import ray

    with socket.socket() as place:
        place.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{place.getsockname()[1]}"


def _rank(place: str, rank: int, world: int, on_gpus: bool) -> float:
    """One member of the all-reduce; returns its seconds.

    Raises:
        ValueError: the sum is wrong.
    """
    import torch
    from torch import distributed

    device = torch.device("cuda" if on_gpus else "cpu")
    distributed.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"tcp://{place}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=LINK_TIMEOUT_S),
    )  # fmt: skip
    try:
        values = torch.full((MEGABYTES * 250_000,), float(rank + 1), device=device)
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(values)
        total = float(values[-1])
        seconds = time.perf_counter() - began
    finally:
        distributed.destroy_process_group()
    expected = world * (world + 1) / 2
    if total != expected:
        raise ValueError(f"the sum over {world} ranks is {total}, not {expected}")
    return seconds


def _transfer(nodes: Sequence[str]) -> Finding:
    import numpy as np
    import ray

    data = np.frombuffer(os.urandom(MEGABYTES * 1_000_000), dtype=np.uint8)
    checksum = zlib.crc32(data.data)
    fetch = ray.remote(num_cpus=0, max_retries=0)(_fetch)
    try:
        reference = ray.put(data)
        calls: dict[str, ObjectRef[Any]] = {
            node: fetch.options(scheduling_strategy=_on(node)).remote([reference]) for node in nodes
        }
        answers = dict(zip(calls, ray.get(list(calls.values()), timeout=LINK_TIMEOUT_S), strict=True))
    except Exception as error:  # whatever Ray raises is the finding
        return Finding(
            "weight transfer", "cluster", "FAIL", one_line(error),
            "open the ports between the nodes (--object-manager-port, --min-worker-port to --max-worker-port)",
        )  # fmt: skip
    wrong = [node for node, (found, _) in answers.items() if found != checksum]
    slowest = max(seconds for _, seconds in answers.values())
    return judged(
        "weight transfer", "cluster",
        f"{MEGABYTES} MB to {len(nodes)} node(s), the slowest in {slowest:.2f} s"
        + (f"; damaged on {', '.join(wrong)}" if wrong else ""),
        good=not wrong, otherwise="FAIL", remedy="the network or the memory of these nodes damages data: take them out",
    )  # fmt: skip


def _fetch(references: Sequence[ObjectRef[np.ndarray[Any, Any]]]) -> tuple[int, float]:
    """Checksum of an object, and the seconds until it was here."""
    import ray

    began = time.perf_counter()
    data = ray.get(references[0])
    seconds = time.perf_counter() - began
    return zlib.crc32(data.data), seconds


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)

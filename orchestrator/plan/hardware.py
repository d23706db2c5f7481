"""What a plan assumes of the machines; every number is a field that is printed with the plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from orchestrator.plan.meter import Cost

GIB = 1 << 30
GB = 1e9
TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """GPUs, nodes, and the speeds that are taken for granted; the defaults are those of H100 nodes.

    Attributes:
        gpu_gib: memory of a GPU.
        nodes: nodes with GPUs; None takes as many as the pools fill.
        gpus_per_node: GPUs of a node.
        host_gib: memory of a node.
        tflops: peak of a GPU in bfloat16, dense.
        tf32_tflops: the same for convolutions in float32, which run in TF32.
        float32_tflops: the same for matrix products in float32.
        mfu: share of the peak that matrix products and attention reach.
        conv_mfu: share of the peak that convolutions reach.
        nvlink_gbs: GB/s a GPU receives in collectives within a node.
        network_gbs: GB/s a node receives in collectives from other nodes.
        zero_overlap: share of ZeRO-3's collectives that is hidden behind computation.
        publish_gbs: GB/s from the learner's GPUs into the object store.
        store_gbs: GB/s a node's object store sends to, or receives from, other nodes.
        reserved_gib: memory of a GPU that CUDA, its libraries and NCCL take.
        fragmentation: share of the activations that the allocator wastes.
        process_gib: host memory of a process with CUDA, without what it holds.
        object_store_share: share of the host's memory that Ray gives to the object store.
        object_store_gib: most that it gives.
        host_adam_s: seconds of a CPU thread for AdamW on 1e9 elements in host memory.
    """

    gpu_gib: float = 80.0
    nodes: int | None = None
    gpus_per_node: int = 8
    host_gib: float = 1000.0
    tflops: float = 989.0
    tf32_tflops: float = 494.0
    float32_tflops: float = 67.0
    mfu: float = 0.40
    conv_mfu: float = 0.20
    nvlink_gbs: float = 280.0
    network_gbs: float = 200.0
    zero_overlap: float = 0.5
    publish_gbs: float = 1.5
    store_gbs: float = 2.0
    reserved_gib: float = 1.5
    fragmentation: float = 0.05
    process_gib: float = 4.0
    object_store_share: float = 0.3
    object_store_gib: float = 186.0
    host_adam_s: float = 6.0

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """Seconds that one GPU takes for a computation in a type."""
        half = dtype == torch.bfloat16
        products = (self.tflops if half else self.float32_tflops) * self.mfu
        convolutions = (self.tflops if half else self.tf32_tflops) * self.conv_mfu
        return cost.matmul_flops / TERA / products + cost.conv_flops / TERA / convolutions

    @property
    def store_gib(self) -> float:
        """Size of a node's object store."""
        return min(self.host_gib * self.object_store_share, self.object_store_gib)

    def nodes_for(self, gpus: int) -> int:
        """Nodes that so many GPUs fill."""
        return -(-gpus // self.gpus_per_node)

    def collective_s(self, nbytes: float, ranks: int) -> float:
        """Seconds for every one of ``ranks`` to receive ``nbytes`` in collectives of whole nodes."""
        nodes = self.nodes_for(ranks)
        inside = nbytes / (self.nvlink_gbs * GB)
        return max(inside, nbytes * (1 - 1 / nodes) / (self.network_gbs * GB))

    def stated(self) -> list[str]:
        """The assumptions, as lines for people."""
        shown = dataclasses.asdict(self) | {"nodes": self.nodes or "as many as the pools fill"}
        return [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]

"""Reductions of numbers over all ranks of the learner group; every rank must make each call."""

from __future__ import annotations

import torch


def reduced(device: torch.device, values: dict[str, float], how: str) -> dict[str, float]:
    """Sums (``how="sum"``) or maxima (``"max"``) of numbers over all ranks."""
    import torch.distributed as dist

    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return dict(zip(values, tensor.tolist(), strict=True))

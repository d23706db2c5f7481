"""Numbers of all ranks of the learner group, reduced or gathered; every rank must make each call."""

from __future__ import annotations

import torch


def reduced(device: torch.device, values: dict[str, float], how: str) -> dict[str, float]:
    """Sums (``how="sum"``) or maxima (``"max"``) of numbers over all ranks."""
    import torch.distributed as dist

    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return dict(zip(values, tensor.tolist(), strict=True))


def gathered(values: list[float]) -> list[float]:
    """The numbers of all ranks, of each any number, in the order of the ranks."""
    import torch.distributed as dist

    everywhere: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, values)
    return [value for of_rank in everywhere for value in of_rank]

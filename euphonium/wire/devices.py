"""The device that a role computes on: what it has reserved, not what its machine has."""

from __future__ import annotations

import os

import torch


def reserved_device(num_gpus: float) -> torch.device:
    """The device of an actor, task or worker with this reservation: its GPU, or the CPU where it reserved none.

    Without a reservation the machine's GPUs are hidden from the whole process, reward models and other libraries
    included; Ray leaves them visible. So this must be called before anything touches a GPU.

    Args:
        num_gpus: GPUs that the process has reserved, possibly a fraction.
    """
    if num_gpus <= 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu")
    return local_device()


def local_device() -> torch.device:
    """The GPU if this process sees one, else the CPU: for commands that a user runs on a machine of their own."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release_unused(num_gpus: float) -> None:
    """Gives back the GPU memory that PyTorch keeps for later, where other processes share the GPU.

    Args:
        num_gpus: GPUs that this process has reserved; only a part of one is shared.
    """
    if 0 < num_gpus < 1 and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

"""Where a role computes."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The GPU that this process may see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

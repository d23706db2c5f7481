"""The device that a role computes on."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The GPU if this process sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""How a learning rate goes from update to update."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "whole_cosine"]


def learning_rate(peak: float, done: int, updates: int, warmup: int, shape: Shape) -> float:
    """Rate of the next update.

    Args:
        peak: highest rate.
        done: updates done.
        updates: of the whole training.
        warmup: updates over which the rate rises linearly.
        shape: of the way from the peak to zero after the warm-up; a ``whole_cosine`` spans all updates, and the
            warm-up lies under it.
    """
    if shape == "whole_cosine":
        return peak * min((done + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done / updates)))
    if done < warmup:
        return peak * (done + 1) / warmup
    progress = min(1.0, (done - warmup) / max(1, updates - warmup))
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[shape]
    return peak * factor

"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "whole_cosine"]


def learning_rate(peak: float, done: int, updates: int, warmup: int, shape: Shape) -> float:
    """Learning rate of the next update.

    Args:
        peak: highest rate.
        done: number of updates done.
        updates: number of updates of the whole training.
        warmup: number of updates over which the rate rises linearly.
        shape: decay from the peak to zero after the warm-up. A ``whole_cosine`` spans all updates instead; the rate is
            the lower one of warm-up and cosine.
    """
    if shape == "whole_cosine":
        return peak * min((done + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done / updates)))
    if done < warmup:
        return peak * (done + 1) / warmup
    progress = min(1.0, (done - warmup) / max(1, updates - warmup))
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[shape]
    return peak * factor

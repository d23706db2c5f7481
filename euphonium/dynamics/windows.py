"""Windows of stochastic steps that move during training (MixGRPO): inside the law, outside the ODE."""

from __future__ import annotations

import random


def sliding_window(iteration: int, *, size: int, allowed: tuple[int, int], stride: int, every: int) -> tuple[int, int]:
    """A window that moves from the first allowed step towards data, and starts over at the end.

    Args:
        iteration: counted from 0.
        size: steps in the window.
        allowed: half-open range of steps that it stays in.
        stride: steps that it moves at a time.
        every: iterations that it stays in one place.

    Returns:
        Half-open range of steps, never shorter than ``size``.
    """
    first, last = _starts(size, allowed)
    places = (last - first) // stride + 1
    if (last - first) % stride:
        places += 1
    start = min(first + stride * ((iteration // every) % places), last)
    return start, start + size


def random_window(number: int, *, size: int, allowed: tuple[int, int], seed: int) -> tuple[int, int]:
    """A window at a random place: one an iteration (Flow-GRPO-Fast), or one a group (Flash-GRPO).

    Args:
        number: of the iteration or group.
        size: steps in the window.
        allowed: half-open range of steps that it stays in.
        seed: of the draw.

    Returns:
        Half-open range of steps.
    """
    first, last = _starts(size, allowed)
    start = random.Random(f"{seed}/{number}").randint(first, last)
    return start, start + size


def middle_window(*, size: int, allowed: tuple[int, int]) -> tuple[int, int]:
    """The window in the middle of all places, the earlier one of two."""
    first, last = _starts(size, allowed)
    return (first + last) // 2, (first + last) // 2 + size


def _starts(size: int, allowed: tuple[int, int]) -> tuple[int, int]:
    first, last = allowed[0], allowed[1] - size
    if size < 1 or first < 0 or last < first:
        raise ValueError(
            f"a window of {size} steps does not fit into the steps {allowed[0]} to {allowed[1]}; make it shorter"
        )
    return first, last

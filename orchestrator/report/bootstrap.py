"""Bootstrap intervals of means of what comes in groups: samples of a prompt, judgements of a pair."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
# Numbers of a block of resamples, so that many groups do not take the machine's memory.
BLOCK = 1 << 24


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval.

    Attributes:
        mean: the mean.
        low: lower end.
        high: upper end; equal to the mean, like ``low``, where there is one group only and nothing is known.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def grouped_interval(values: Sequence[float], groups: Sequence[Hashable], seed: int = 0) -> Interval:
    """The mean of all values, with whole groups drawn anew: values within a group depend on each other.

    Example:
        >>> grouped_interval([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
        Interval(mean=0.5, low=0.0, high=1.0)
        >>> grouped_interval([0.0, 0.0, 1.0, 1.0], ["a", "b", "a", "b"])
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums, counts = np.zeros(len(places)), np.zeros(len(places))
    for value, group in zip(values, groups, strict=True):
        sums[places[group]] += value
        counts[places[group]] += 1
    drawn = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    left = RESAMPLES
    while left:
        chosen = drawn.integers(len(sums), size=(min(left, max(1, BLOCK // len(sums))), len(sums)))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
        left -= len(chosen)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))

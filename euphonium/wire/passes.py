"""Cuts a batch into passes that fit the device's memory.

How many samples a pass can hold depends on the model, its size, and what else is on the device; a number in a recipe is
a plan. Here an out-of-memory error halves the passes for good and repeats the one that failed, instead of ending a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from euphonium.config.base import PassSize, chosen

log = logging.getLogger(__name__)

R = TypeVar("R")


class Passes:
    """Passes of a size that only shrinks.

    Attributes:
        size: most samples in a pass.
    """

    def __init__(self, size: PassSize, field: str) -> None:
        """Creates the passes.

        Args:
            size: most samples in a pass at the start.
            field: the recipe's field with this size, for the warning.

        Raises:
            ConfigError: the size is ``auto``, and nothing has chosen one.
        """
        self.size = chosen(size, field)
        self._field = field

    def run(self, total: int, compute: Callable[[slice], R]) -> list[R]:
        """Results of all passes over ``total`` samples, in order.

        Args:
            total: number of samples.
            compute: computes the samples of a slice; must have no lasting effect when it runs out of memory.

        Raises:
            torch.OutOfMemoryError: not even a single sample fits.

        Example:
            >>> Passes(2, "rollout.samples_per_pass").run(5, lambda part: list(range(5))[part])
            [[0, 1], [2, 3], [4]]
        """
        results: list[R] = []
        begin = 0
        while begin < total:
            part = slice(begin, min(begin + self.size, total))
            fits = True
            try:
                results.append(compute(part))
            except torch.OutOfMemoryError:
                if part.stop - part.start == 1:
                    raise
                fits = False
            # Only outside the handler: the error's traceback keeps the failed pass's activations alive.
            if fits:
                begin = part.stop
            else:
                self._halve(part.stop - part.start)
        return results

    def _halve(self, failed: int) -> None:
        self.size = max(1, failed // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory with %d samples in a pass; from here on %d (set %s to %d or less)",
            failed, self.size, self._field, self.size,
        )  # fmt: skip

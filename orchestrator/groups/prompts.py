"""Prompt files, and the order in which a run draws from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from euphonium.prompt_files import read_prompt_file
from euphonium.wire.records import GroupTask


def read_prompts(path: Path, field: str) -> list[str]:
    """Texts of the prompts of a file; arguments and errors of :func:`euphonium.prompt_files.read_prompt_file`."""
    return [prompt.text for prompt in read_prompt_file(path, field)]


class PromptStream:
    """Tasks by ordinal: a fresh shuffle of the prompts every epoch, a seed of its own for every group.

    The stream has no state: a run's place in it is the number of groups that it has consumed, so a resumed run
    neither skips nor repeats a prompt.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        # Two epochs meet in the batches that are drawn ahead.
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def task(self, ordinal: int, iteration: int = 0) -> GroupTask:
        """The task with this ordinal, drawn for an iteration (from 0)."""
        epoch, position = divmod(ordinal, len(self._prompts))
        noise = np.random.SeedSequence([self._seed, 1, ordinal]).generate_state(1, np.uint64)[0]
        return GroupTask(
            group_id=ordinal,
            prompt=self._prompts[self._order(epoch)[position]],
            seed=int(noise >> np.uint64(1)),
            iteration=iteration,
        )

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._prompts))


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """At most ``count`` prompts, evenly spaced over the file."""
    chosen = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    return [prompts[i] for i in chosen]

"""The order in which a run takes the prompts of its file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from euphonium.config import PromptsConfig
from euphonium.errors import ConfigError
from euphonium.prompt_files import read_prompt_file
from euphonium.wire.records import GroupTask


def read_prompts(path: Path, field: str) -> list[str]:
    """Texts of a prompt file, with their metadata where the file has any.

    Arguments and errors are those of :func:`euphonium.prompt_files.read_prompt_file`.
    """
    return [prompt.described for prompt in read_prompt_file(path, field)]


def refuse_shared_prompts(prompts: PromptsConfig) -> None:
    """Checks that no held-out prompt is also a training prompt.

    Raises:
        ConfigError: one is.
    """
    held_out = read_prompts(prompts.evaluation, "prompts.evaluation")
    both = set(held_out) & set(read_prompts(prompts.train, "prompts.train"))
    if both:
        raise ConfigError(
            f"prompts.evaluation: {len(both)} prompts of {prompts.evaluation} are also in {prompts.train}, for example "
            f"{min(both)!r}; held-out prompts must not be trained on"
        )


class PromptStream:
    """The tasks of a run by ordinal: prompts are shuffled anew every epoch, and every group has a seed of its own.

    The stream has no state: a task depends only on its ordinal, and a run only has to remember how many groups it has
    consumed. A resumed run therefore neither skips nor repeats a prompt.

    Example:
        >>> stream = PromptStream(["a", "b", "c"], seed=0)
        >>> epochs = [[stream.task(3 * epoch + i).prompt for i in range(3)] for epoch in range(2)]
        >>> [sorted(epoch) for epoch in epochs]
        [['a', 'b', 'c'], ['a', 'b', 'c']]
        >>> stream.task(4) == PromptStream(["a", "b", "c"], seed=0).task(4)
        True
        >>> len({stream.task(ordinal).seed for ordinal in range(6)})
        6
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        # Batches that are drawn ahead may span two epochs.
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def task(self, ordinal: int, iteration: int = 0, strength: float = 1.0) -> GroupTask:
        """The task with this ordinal, for an iteration (from 0), with a multiple of the recipe's guidance."""
        epoch, position = divmod(ordinal, len(self._prompts))
        noise = np.random.SeedSequence([self._seed, 1, ordinal]).generate_state(1, np.uint64)[0]
        return GroupTask(
            group_id=ordinal,
            prompt=self._prompts[self._order(epoch)[position]],
            seed=int(noise >> np.uint64(1)),
            iteration=iteration,
            strength=strength,
        )

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._prompts))


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """At most ``count`` prompts, evenly spaced over all."""
    chosen = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    return [prompts[i] for i in chosen]

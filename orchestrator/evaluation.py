"""Evaluation on held-out prompts: which prompts and noise, and the pictures that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import RunConfig
from core.errors import ConfigError
from orchestrator.pictures import Video, contact_sheet, save_gif, save_samples, side_by_side
from orchestrator.prompts import read_prompts, spread


def evaluation_set(config: RunConfig) -> tuple[list[str], list[int]]:
    """Prompts and noise seeds of every evaluation of a run: always the same, so that evaluations compare.

    Raises:
        ConfigError: a held-out prompt that is also trained on.
    """
    held_out = read_prompts(config.prompts.evaluation, "prompts.evaluation")
    both = set(held_out) & set(read_prompts(config.prompts.train, "prompts.train"))
    if both:
        raise ConfigError(
            f"prompts.evaluation: {len(both)} prompts of {config.prompts.evaluation} are also in "
            f"{config.prompts.train}, for example {min(both)!r}; held-out prompts must not be trained on"
        )
    chosen = spread(held_out, config.evaluation.prompts)
    prompts = [prompt for prompt in chosen for _ in range(config.evaluation.samples_per_prompt)]
    states = np.random.SeedSequence([config.evaluation.seed, 2]).generate_state(len(prompts), np.uint64)
    return prompts, [int(state >> np.uint64(1)) for state in states]


class Evaluation:
    """Pictures of a run's evaluations, in ``samples/``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, iteration: int, prompts: Sequence[str], videos: Video, scores: Mapping[str, Any]) -> Image.Image:
        """Writes the clips of one evaluation; after the first, also each prompt before and after."""
        target = self.folder / f"iteration_{iteration:06d}"
        sheet = save_samples(target, prompts, videos, scores)
        np.save(target / "videos.npy", videos)
        first = self.folder / "iteration_000000" / "videos.npy"
        if iteration > 0 and first.exists():
            before = np.load(first)
            rows = []
            for i, prompt in enumerate(prompts):
                save_gif(side_by_side(before[i], videos[i]), self.folder / "before_after" / f"{i:02d}.gif")
                rows.append((prompt, [("before", before[i]), (f"after {iteration} iterations", videos[i])]))
            contact_sheet(rows).save(self.folder / "before_after.png")
        return sheet

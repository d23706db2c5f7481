"""Evaluation on held-out prompts: its prompts and noise, its metrics, and the pictures of its samples.

Rollout actors draw the samples and ORM servers score them (orchestrator/pools/rollout_service.py); evaluations wait for
both, ahead of groups for training. Each actor draws a share of the samples, which is scored once it is there, in as many
parts as it takes to occupy all servers; clips are decoded while the last shares are scored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from euphonium.config import OutcomeRewardConfig, RunConfig
from euphonium.errors import ConfigError, RewardError
from euphonium.rewards.total import total_weight
from euphonium.wire.records import Array, OrmAnswer, Videos, WeightKind
from orchestrator.groups.prompts import read_prompts, spread
from orchestrator.pools.rollout_service import RolloutService
from orchestrator.report.pictures import contact_sheet, save_gif, save_samples, side_by_side
from orchestrator.report.tracking import Tracker

log = logging.getLogger(__name__)


def evaluation_set(config: RunConfig) -> tuple[list[str], list[int]]:
    """Prompts and noise seeds of a run's evaluations, always the same, so that evaluations can be compared.

    Raises:
        ConfigError: a held-out prompt is also a training prompt.
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


def evaluation_metrics(scores: Mapping[str, Array], rewards: Sequence[OutcomeRewardConfig]) -> dict[str, float]:
    """Metrics of an evaluation: the mean of each reward, and the weighted mean of all.

    Args:
        scores: rewards by name, ``[samples]`` each; a reward that failed is missing, and the total with it if it has a
            weight. There is no total of rewards that all have weight 0.
        rewards: the recipe's rewards, with their weights.

    Example:
        >>> rewards = [
        ...     OutcomeRewardConfig(name="motion", type="sprite_motion", weight=1.0),
        ...     OutcomeRewardConfig(name="quality", type="sprite_quality", weight=3.0),
        ... ]
        >>> scores = {"motion": np.array([0.0, 1.0]), "quality": np.array([0.8, 1.0])}
        >>> for name, value in evaluation_metrics(scores, rewards).items():
        ...     print(name, round(value, 3))
        eval/motion/mean 0.5
        eval/quality/mean 0.9
        eval/total/mean 0.8
    """
    metrics = {f"eval/{name}/mean": float(values.mean()) for name, values in scores.items()}
    metrics |= {f"eval/{reward.name}/missing": 1.0 for reward in rewards if reward.name not in scores}
    weights = {reward.name: reward.weight for reward in rewards if reward.weight != 0}
    if weights and weights.keys() <= scores.keys():
        total = sum(weight * metrics[f"eval/{name}/mean"] for name, weight in weights.items())
        metrics["eval/total/mean"] = total / total_weight(rewards)
    return metrics


class SampleFolder:
    """Pictures of a run's evaluations, in ``samples/``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, iteration: int, prompts: Sequence[str], videos: Videos, scores: Mapping[str, Any]) -> Image.Image:
        """Writes the clips of an evaluation, with comparisons to the first one; returns the contact sheet."""
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


class Evaluator:
    """Evaluates a run's policy, with the run's rollout actors and ORM servers."""

    def __init__(self, config: RunConfig, rollouts: RolloutService, tracker: Tracker) -> None:
        """Reads the held-out prompts.

        Args:
            config: configuration of the run.
            rollouts: draws and scores samples.
            tracker: records the contact sheets.

        Raises:
            ConfigError: a held-out prompt is also a training prompt.
        """
        self._config = config
        self._rollouts = rollouts
        self._tracker = tracker
        self._prompts, self._seeds = evaluation_set(config)
        self._pictures = SampleFolder(config.run_dir / "samples")

    async def evaluate(self, iteration: int) -> dict[str, float]:
        """Draws and scores deterministic samples of the policy, or of its average if there is one; saves some as clips.

        Args:
            iteration: number of iterations done; 0 before training.

        Returns:
            Metrics.

        Raises:
            RewardError: no ORM server answered.
            TrainingError: no rollout actor drew the samples.
        """
        began = time.monotonic()
        config, prompts = self._config, self._prompts
        kind: WeightKind = "average" if config.optimizer.averages and iteration > 0 else "policy"
        latents, scores, videos = await self._drawn_and_judged(kind)
        shown = self._shown
        if videos is not None:
            sheet = self._pictures.save(
                iteration, [prompts[i] for i in shown], videos, {n: v[shown] for n, v in scores.items()}
            )
            self._tracker.picture("samples", np.asarray(sheet), iteration)
        metrics = evaluation_metrics(scores, config.rewards.outcome)
        return {**metrics, "time/evaluation_s": time.monotonic() - began}

    async def _scores(self, latents: Array) -> OrmAnswer:
        """Outcome rewards of all samples; those that fail in all attempts are missing, unless they are to end the run.

        Raises:
            RewardError: no ORM server answered, or a reward failed whose ``on_failure`` is ``abort``.
        """
        rewards, timeout = self._config.rewards, self._config.rollout.deadline_s
        try:
            scores, _ = await self._rollouts.scores(latents, self._prompts, timeout, rewards.optional)
        except RewardError as error:
            log.warning("evaluation: trying again without the rewards that fail: %s", error)
            droppable = tuple(reward.name for reward in rewards.outcome if reward.on_failure == "drop_group")
            scores, _ = await self._rollouts.scores(latents, self._prompts, timeout, droppable)
        return scores

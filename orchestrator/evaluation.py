"""Evaluation on held-out prompts: its prompts and noise, its metrics, and the pictures of its samples.

Rollout actors draw the samples and ORM servers score them (orchestrator/pools/rollout_service.py); evaluations wait for
both, ahead of groups for training. Each actor draws a share of the samples, which is scored once it is there, in as
many parts as it takes to occupy all servers; clips are decoded while others are scored.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from euphonium.config import OutcomeRewardConfig, RunConfig
from euphonium.errors import RewardError
from euphonium.rewards.total import total_weight
from euphonium.wire.records import Array, OrmAnswer, Videos, WeightKind
from orchestrator.groups.prompts import read_prompts, refuse_shared_prompts, spread
from orchestrator.report.pictures import contact_sheet, save_gif, save_samples, side_by_side
from orchestrator.report.trackers import SavedClip
from orchestrator.report.tracking import Tracker

if TYPE_CHECKING:
    from orchestrator.pools.rollout_service import RolloutService

log = logging.getLogger(__name__)

Indices = NDArray[np.int_]


def evaluation_set(config: RunConfig) -> tuple[list[str], list[int]]:
    """Prompts and noise seeds of a run's evaluations, always the same, so that evaluations can be compared.

    Raises:
        ConfigError: a held-out prompt is also a training prompt.
    """
    refuse_shared_prompts(config.prompts)
    held_out = read_prompts(config.prompts.evaluation, "prompts.evaluation")
    chosen = spread(held_out, config.evaluation.prompts)
    prompts = [prompt for prompt in chosen for _ in range(config.evaluation.samples_per_prompt)]
    return prompts, sample_seeds(config.evaluation.seed, len(prompts))


def sample_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the noise of so many samples, those of a seed always the same."""
    states = np.random.SeedSequence([seed, 2]).generate_state(count, np.uint64)
    return [int(state >> np.uint64(1)) for state in states]


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


def merged_scores(parts: Sequence[tuple[Indices, OrmAnswer]], total: int) -> OrmAnswer:
    """Scores of all samples from those of parts of them.

    Args:
        parts: for each part which samples it has, and their rewards by name.
        total: number of samples, each of which is in one part.

    Returns:
        Rewards by name, float32 ``[total]`` each. A reward that is missing in one part is missing, as it would be if
        all samples had been scored at once.

    Example:
        >>> one = (np.array([0, 2]), {"icon": np.array([1.0, 3.0]), "motion": np.array([0.0, 0.0])})
        >>> other = (np.array([1]), {"icon": np.array([2.0])})
        >>> {name: values.tolist() for name, values in merged_scores([one, other], 3).items()}
        {'icon': [1.0, 2.0, 3.0]}
    """
    names = [name for name in parts[0][1] if all(name in answer for _, answer in parts)]
    merged: OrmAnswer = {name: np.empty(total, dtype=np.float32) for name in names}
    for indices, answer in parts:
        for name in names:
            merged[name][indices] = answer[name]
    return merged


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

    def saved(self, iteration: int) -> list[SavedClip]:
        """The clips of an evaluation that are in the folder."""
        target = self.folder / f"iteration_{iteration:06d}"
        found = []
        for clip in json.loads((target / "index.json").read_text(encoding="utf-8")):
            scores = "".join(f", {name} {value:g}" for name, value in clip["rewards"].items())
            found.append(SavedClip(target / clip["file"], clip["prompt"] + scores))
        return found


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
        count = len(self._prompts)
        self._shown = np.linspace(0, count - 1, min(config.evaluation.clips, count)).round().astype(int)
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
        scores, videos = await self._judged(kind)
        if videos is not None:
            shown = self._shown
            sheet = self._pictures.save(
                iteration, [prompts[i] for i in shown], videos, {n: v[shown] for n, v in scores.items()}
            )
            self._tracker.picture("samples", np.asarray(sheet), iteration)
            self._tracker.clips(self._pictures.saved(iteration), iteration)
        metrics = evaluation_metrics(scores, config.rewards.outcome)
        return {**metrics, "time/evaluation_s": time.monotonic() - began}

    async def _judged(self, kind: WeightKind) -> tuple[OrmAnswer, Videos | None]:
        """Rewards of all samples, in the order of the prompts, and the clips that are to be shown."""
        count = min(len(self._prompts), max(1, self._rollouts.rollout_actors))
        drawn = [asyncio.ensure_future(self._drawn(slice(i, None, count), kind)) for i in range(count)]
        parts = self._parts(count)
        scored = [asyncio.ensure_future(self._scored(part, drawn)) for part in parts]
        clips = asyncio.ensure_future(self._clips(drawn))
        everything = (*drawn, *scored, clips)
        try:
            answers = await asyncio.gather(*scored)
            return merged_scores(list(zip(parts, answers, strict=True)), len(self._prompts)), await clips
        finally:
            # Where one has failed, the others have nobody left to wait for them.
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    def _parts(self, shares: int) -> list[Indices]:
        """Which samples are scored together, of as many as there are shares, of which each is drawn by one actor."""
        total, pool = len(self._prompts), self._config.pools.orm
        if not pool.merge:
            # The passes that one server would make of all samples, so that no number depends on who is there.
            return np.split(np.arange(total), range(pool.max_batch, total, pool.max_batch))
        each = max(1, math.ceil(self._rollouts.orm_servers / shares))
        split = [np.array_split(np.arange(i, total, shares), each) for i in range(shares)]
        return [part for parts in split for part in parts if len(part)]

    async def _drawn(self, share: slice, kind: WeightKind) -> Array:
        return await self._rollouts.samples(self._prompts[share], self._seeds[share], kind)

    async def _latents(self, samples: Indices, drawn: Sequence[Awaitable[Array]]) -> Array:
        """Latents of some samples, once their shares are drawn; sample ``i`` is in share ``i % len(drawn)``."""
        count = len(drawn)
        return np.stack([(await drawn[i % count])[i // count] for i in samples])

    async def _scored(self, part: Indices, drawn: Sequence[Awaitable[Array]]) -> OrmAnswer:
        return await self._scores(await self._latents(part, drawn), [self._prompts[i] for i in part])

    async def _clips(self, drawn: Sequence[Awaitable[Array]]) -> Videos | None:
        """Decodes the samples that are shown; None if none are."""
        if not len(self._shown):
            return None
        return await self._rollouts.videos(await self._latents(self._shown, drawn), self._config.rollout.deadline_s)

    async def _scores(self, latents: Array, prompts: Sequence[str]) -> OrmAnswer:
        """Outcome rewards of samples; those that fail in all attempts are missing, unless they are to end the run.

        Raises:
            RewardError: no ORM server answered, or a reward failed whose ``on_failure`` is ``abort``.
        """
        rewards, timeout = self._config.rewards, self._config.rollout.deadline_s
        try:
            scores, _ = await self._rollouts.scores(latents, prompts, timeout, rewards.optional)
        except RewardError as error:
            log.warning("evaluation: trying again without the rewards that fail: %s", error)
            droppable = tuple(reward.name for reward in rewards.outcome if reward.on_failure == "drop_group")
            scores, _ = await self._rollouts.scores(latents, prompts, timeout, droppable)
        return scores

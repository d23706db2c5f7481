"""Outcome rewards of samples that are drawn outside of a run: ``evaluate`` and ``compare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.generators.sample_size import SampleSize
from euphonium.rewards.total import total_weight, weighted_total
from euphonium.wire.records import Array, OrmAnswer
from orchestrator.evaluation import evaluation_set, sample_seeds
from orchestrator.generation.policies import resized
from orchestrator.generation.samples import read_suite
from orchestrator.groups.prompts import spread

TOTAL = "total"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command asks for in place of a run's own evaluation.

    Attributes:
        changes: fields of the run's ``evaluation`` to replace.
        size: height, width and frames of the samples, as far as they differ from those of the run.
        files: prompt files in place of the held-out prompts.
    """

    changes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    size: SampleSize = dataclasses.field(default_factory=dict)
    files: Sequence[Path] = ()

    def of(self, config: RunConfig) -> tuple[RunConfig, list[str], list[int]]:
        """A run's configuration with these settings, and the prompts and seeds of its samples.

        Raises:
            ConfigError: a setting is impossible, or a file cannot be read.
        """
        try:
            evaluation = type(config.evaluation).model_validate(config.evaluation.model_dump() | dict(self.changes))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        config = config.model_copy(update={"evaluation": evaluation, "model": resized(config.model, self.size)})
        if not self.files:
            return config, *evaluation_set(config)
        read = list(dict.fromkeys(entry.prompt.described for entry in read_suite(self.files)))
        chosen = spread(read, self.changes.get("prompts", len(read)))
        prompts = [prompt for prompt in chosen for _ in range(evaluation.samples_per_prompt)]
        return config, prompts, sample_seeds(evaluation.seed, len(prompts))


class Scorer:
    """The decoder and the outcome rewards of a run, loaded."""

    def __init__(self, config: RunConfig) -> None:
        from euphonium.generators.registry import open_generator
        from euphonium.wire.devices import local_device
        from reward_servers.orm import OrmScorer

        self._rewards = config.rewards.outcome
        self._scorer = OrmScorer(self._rewards, open_generator(config.model), local_device(), config.pools.orm)
        self.videos = self._scorer.videos

    def score(self, latents: Array, prompts: Sequence[str]) -> OrmAnswer:
        """Rewards by name ``[samples]``, and their weighted mean as the total, if all that have a weight are there.

        Raises:
            RewardError: a reward failed whose ``on_failure`` is ``abort``.
        """
        droppable = [reward.name for reward in self._rewards if reward.on_failure == "drop_group"]
        scores = dict(self._scorer.score(latents, prompts, droppable))
        missing = self.missing(scores)
        if total_weight(self._rewards) and not any(r.weight and r.name in missing for r in self._rewards):
            scores[TOTAL] = weighted_total(scores, self._rewards, len(prompts)) / total_weight(self._rewards)
        return scores

    def missing(self, scores: OrmAnswer) -> list[str]:
        """Names of the rewards that failed."""
        return [reward.name for reward in self._rewards if reward.name not in scores]


def mean_and_error(values: Array) -> dict[str, float]:
    """Mean and standard error of a reward, rounded."""
    error = float(values.std() / np.sqrt(len(values)))
    return {"mean": round(float(values.mean()), 5), "standard_error": round(error, 5)}

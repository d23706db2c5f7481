"""Credit assignment: an advantage for each action of each sample, and the choice of the samples to train on.

Euphonium, Eq. 16: ``A_k = sum_m w_m norm(r_m(x_T)) + w_p norm(r_p(x_k))``, where an action is step k of a sample. All
groups of an iteration are treated together, because normalisation may span them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.guidance import member_strengths
from euphonium.config import RunConfig
from euphonium.config.rewards import FINAL_PROCESS
from euphonium.dynamics import AdvantageRule, Advantages, GroupRewards, group_advantages
from euphonium.wire.records import Array, GroupInfo, GroupPayload, OrmAnswer, TrainingGroup
from learners.policy.batching import dealt
from orchestrator.report.statistics import rollout_statistics

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class ScoredGroup:
    """A drawn group with its outcome rewards.

    Attributes:
        info: description of the group, with its process rewards.
        latents: reference to its final latents, float32 ``[group, *latent]``.
        payload: reference to its trained transitions.
        scores: outcome rewards by name, ``[group]`` each; those of weight 0 may be missing.
        scoring_s: seconds that scoring took.
    """

    info: GroupInfo
    latents: ObjectRef[Array]
    payload: ObjectRef[GroupPayload]
    scores: OrmAnswer
    scoring_s: float


@dataclass(frozen=True)
class Batch:
    """The groups of one iteration.

    Attributes:
        groups: the groups that were drawn and scored.
        dropped: number of groups that were dropped.
        next_group: ordinal of the first group of the next iteration.
        seconds: time from the first task to the last score.
    """

    groups: list[ScoredGroup]
    dropped: int
    next_group: int
    seconds: float


def advantages(
    config: RunConfig, infos: Sequence[GroupInfo], scores: Sequence[Mapping[str, Array]]
) -> list[Advantages]:
    """Advantages of all groups of an iteration, given their outcome rewards by name, ``[group]`` each."""
    rewards = [
        GroupRewards(
            _outcome(info, group),
            None if info.process_rewards is None else torch.tensor(info.process_rewards),
        )
        for info, group in zip(infos, scores, strict=True)
    ]
    guidance = config.sampler.guidance
    if guidance is None or config.advantage.baseline == "group" or len(guidance.strengths) == 1:
        return group_advantages(rewards, config.advantage_rule())
    if all(guidance.at(info.task.iteration) is None for info in infos):
        return group_advantages(rewards, config.advantage_rule())
    if config.advantage.baseline == "unguided":
        strengths = member_strengths(guidance.strengths, config.rollout.group_size)
        unguided = tuple((strengths == 0).nonzero().flatten().tolist())
        return group_advantages(rewards, replace(config.advantage_rule(), baseline=unguided))
    return _by_strength(rewards, config.advantage_rule(), len(guidance.strengths))


def _outcome(info: GroupInfo, scores: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Outcome rewards of a group by name, with the process reward of its finished samples where that counts as one."""
    final = {} if info.final_rewards is None else {FINAL_PROCESS: info.final_rewards}
    return {name: torch.tensor(values) for name, values in {**scores, **final}.items()}


def _by_strength(rewards: Sequence[GroupRewards], rule: AdvantageRule, strengths: int) -> list[Advantages]:
    """Advantages among the members of a group that were guided alike: every ``strengths``-th sample."""
    parts = [
        GroupRewards(
            {name: values[i::strengths] for name, values in group.outcome.items()},
            None if group.process is None else group.process[i::strengths],
        )
        for group in rewards
        for i in range(strengths)
    ]
    found = group_advantages(parts, rule)
    return [_interleaved(found[begin : begin + strengths]) for begin in range(0, len(found), strengths)]


def _interleaved(parts: Sequence[Advantages]) -> Advantages:
    count = len(parts)
    size = sum(part.values.shape[1] for part in parts)
    values = parts[0].values.new_zeros(parts[0].values.shape[0], size, parts[0].values.shape[2])
    for i, part in enumerate(parts):
        values[:, i::count] = part.values
    samples = sorted(i + count * sample for i, part in enumerate(parts) for sample in part.samples)
    return Advantages(values, tuple(samples), frozenset.intersection(*[part.flat for part in parts]))


def training_groups(
    config: RunConfig, infos: Sequence[GroupInfo], results: Sequence[Advantages]
) -> list[TrainingGroup]:
    """The groups of an iteration with advantages for every step, as the learner group takes them.

    Samples whose advantages are all 0 count in the mean of the loss, and are not computed, unless another term of the
    objective has a gradient there. An update of which nothing would be left computes one sample, whose gradient is 0:
    the ranks stay in step, and the optimizer does what it does without a gradient (momentum, weight decay).
    """
    groups = [_training_group(config, info, result) for info, result in zip(infos, results, strict=True)]
    for positions in dealt(len(groups), config.objective.updates_per_iteration):
        first = positions[0]
        if not any(len(groups[position].samples) for position in positions):
            kept = np.array(results[first].samples[:1], dtype=np.int64)
            groups[first] = replace(groups[first], samples=kept)
    return groups


def beginning(config: RunConfig, groups: Sequence[ScoredGroup]) -> list[TrainingGroup]:
    """The first groups of an iteration as the learner group takes them, before the others are there.

    With ``advantage.scope: group`` no advantage depends on the groups to come: :func:`assign_credit` gives the same.
    """
    infos = [group.info for group in groups]
    results = advantages(config, infos, [group.scores for group in groups])
    return [_training_group(config, info, result) for info, result in zip(infos, results, strict=True)]


def _training_group(config: RunConfig, info: GroupInfo, result: Advantages) -> TrainingGroup:
    values = result.values.expand(-1, -1, config.sampler.num_steps).numpy()
    samples = np.array(result.samples, dtype=np.int64)
    counted = len(samples)
    if not config.objective.trains_zero_advantages:
        samples = samples[values[:, samples].any(axis=(0, 2))]
    return TrainingGroup(info=info, advantages=values, samples=samples, counted=counted)


def assign_credit(config: RunConfig, batch: Batch) -> tuple[list[TrainingGroup], dict[str, float]]:
    """Turns the rewards of an iteration into advantages.

    Returns:
        The groups to train on, in the batch's order, and statistics of the iteration's rollout.
    """
    infos, scores = [group.info for group in batch.groups], [group.scores for group in batch.groups]
    results = advantages(config, infos, scores)
    groups = training_groups(config, infos, results)
    numbers = {
        "time/scoring_s": sum(group.scoring_s for group in batch.groups),
        "advantage/skipped_transitions": float(sum(group.skipped for group in groups)),
    }
    return groups, numbers | rollout_statistics(config, infos, scores, results)

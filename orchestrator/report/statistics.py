"""Metrics of an iteration's rewards: their spread and correlations, failures, and signs of reward hacking."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.guidance import member_strengths
from euphonium.config import RewardsConfig, RunConfig, WatchConfig
from euphonium.dynamics import Advantages
from euphonium.errors import RewardError
from euphonium.rewards.total import weighted_total
from euphonium.wire.records import Array, GroupInfo

Floats = NDArray[np.float64]
ACCURACY = "process/pairwise_accuracy"
# Outcome totals that differ by less than this fraction of their size count as equal: their order is rounding.
RELATIVE_TIE = 1e-6


def rollout_statistics(
    config: RunConfig,
    infos: Sequence[GroupInfo],
    scores: Sequence[Mapping[str, Array]],
    advantages: Sequence[Advantages],
) -> dict[str, float]:
    """Metrics of the drawn and scored groups of one iteration."""
    record = reward_statistics(scores) | missing_rewards(config.rewards, scores)
    processes = [info.process_rewards for info in infos if info.process_rewards is not None]
    if processes:
        size = config.rollout.group_size
        totals = np.stack([weighted_total(group, config.rewards.outcome, size) for group in scores])
        record |= process_statistics(np.stack(processes), totals)
    record |= guidance_gain(config, infos, scores)
    everywhere = set.intersection(*map(set, scores))
    record["advantage/zero_std_groups"] = float(sum(a.flat >= everywhere for a in advantages) if everywhere else 0)
    record["advantage/std"] = float(np.concatenate([a.values.numpy().ravel() for a in advantages]).std())
    seconds = [info.seconds for info in infos]
    total = sum(part["total"] for part in seconds)
    record["rollout/prm_wait_fraction"] = sum(part["process_reward"] for part in seconds) / total
    if config.rollout.reuse_below is not None:
        record["rollout/reused_fraction"] = float(np.mean([info.reused for info in infos]))
    record["rollout/groups"] = float(len(infos))
    record["rollout/samples"] = float(len(infos) * config.rollout.group_size)
    return record


def guidance_gain(
    config: RunConfig, infos: Sequence[GroupInfo], scores: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """What guidance earns: outcome of the guided members of a group over that of its unguided ones.

    In units of the spread within groups, with the standard error of the mean over the groups; empty where groups are
    not mixed (``sampler.guidance.strengths``). The margin is the same of the strongest members over the next weaker
    ones, which may be guided too.
    """
    guidance = config.sampler.guidance
    if guidance is None or len(set(guidance.strengths)) == 1:
        return {}
    mixed = [group for info, group in zip(infos, scores, strict=True) if guidance.at(info.task.iteration) is not None]
    if len(mixed) < 2:
        return {}
    totals = np.stack([weighted_total(group, config.rewards.outcome, config.rollout.group_size) for group in mixed])
    strengths = member_strengths(guidance.strengths, totals.shape[1]).numpy()
    weaker, strongest = np.unique(strengths)[-2:]
    spread = float(np.sqrt(np.mean([totals[:, strengths == s].var(axis=1).mean() for s in np.unique(strengths)])))
    if spread == 0:
        return {}
    record: dict[str, float] = {}

    def compare(name: str, some: NDArray[np.bool_], others: NDArray[np.bool_]) -> None:
        gains = (totals[:, some].mean(axis=1) - totals[:, others].mean(axis=1)) / spread
        record[f"guidance/{name}"] = float(gains.mean())
        record[f"guidance/{name}_error"] = float(gains.std(ddof=1) / np.sqrt(len(gains)))

    if (strengths == 0).any():
        compare("gain", strengths > 0, strengths == 0)
    compare("margin", strengths == strongest, strengths == weaker)
    return record


def reward_statistics(scores: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Mean and spread of every outcome reward, and the correlation of each two.

    Args:
        scores: for every group, the rewards by name, ``[samples]`` each; statistics are over the groups that have them.
    """
    record: dict[str, float] = {}
    names = list(dict.fromkeys(name for group in scores for name in group))
    for name in names:
        values = np.stack([group[name] for group in scores if name in group]).astype(np.float64)
        record[f"reward/{name}/mean"] = float(values.mean())
        record[f"reward/{name}/std"] = float(values.std())
        record[f"reward/{name}/min"] = float(values.min())
        record[f"reward/{name}/max"] = float(values.max())
        record[f"reward/{name}/group_std"] = float(values.std(axis=1).mean())
        record[f"reward/{name}/zero_spread_groups"] = float((np.ptp(values, axis=1) == 0).sum())
    for one, other in itertools.combinations(names, 2):
        both = [(group[one], group[other]) for group in scores if one in group and other in group]
        if both:
            first, second = np.stack(both, axis=1).astype(np.float64)
            record[f"correlation/{one}_vs_{other}"] = within_group_correlation(first, second)
    return record


def missing_rewards(config: RewardsConfig, scores: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Number of groups without the score of each reward that may be missing."""
    return {f"rewards/missing/{name}": float(sum(name not in group for group in scores)) for name in config.optional}


def process_statistics(process: Array, totals: Floats) -> dict[str, float]:
    """Process rewards of the policy's samples, and their agreement with the outcome rewards.

    Args:
        process: ``[groups, samples, steps]``, process rewards that the actions are credited with, 0 at steps without
            one.
        totals: ``[groups, samples]``, weighted outcome rewards.
    """
    values = process.astype(np.float64)
    # Rewards that are 0 for all samples of a group were not requested; groups may be scored at steps of their own.
    scored = (values != 0).any(axis=1)
    some = scored.any(axis=1)
    values, scored, totals = values[some], scored[some], totals[some]
    if not len(values):
        return {}
    last = scored.shape[1] - 1 - scored[:, ::-1].argmax(axis=1)
    final = values[np.arange(len(values)), :, last]
    record = {
        "process/mean": float(np.concatenate([v[:, s].ravel() for v, s in zip(values, scored, strict=True)]).mean()),
        "process/final_mean": float(final.mean()),
        "process/outcome_correlation": within_group_correlation(final, totals),
    }
    right, pairs = ordered_pairs(final, totals)
    record["process/pairs"] = float(pairs)
    if pairs:
        record[ACCURACY] = right / pairs
    return record


def within_group_correlation(a: Floats, b: Floats) -> float:
    """Pearson correlation of two ``[groups, samples]`` arrays after centring each group; 0 without spread.

    Groups are centred because prompts differ in difficulty: otherwise two rewards that disagree within every group
    could still correlate.
    """
    x = a - a.mean(axis=1, keepdims=True)
    y = b - b.mean(axis=1, keepdims=True)
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


def ordered_pairs(process: Floats, totals: Floats) -> tuple[float, int]:
    """Counts the pairs within a group that the process reward orders like the outcome totals, if these differ.

    Args:
        process: ``[groups, samples]``.
        totals: ``[groups, samples]``.

    Returns:
        Number of pairs ordered alike, where a pair with equal process rewards counts half, and number of all pairs.
    """
    i, j = np.triu_indices(totals.shape[1], k=1)
    outcome = totals[:, i] - totals[:, j]
    outcome = np.where(np.abs(outcome) > RELATIVE_TIE * np.abs(totals).max(initial=0.0), outcome, 0.0)
    differ = outcome != 0
    agreement = np.sign(outcome) * np.sign(process[:, i] - process[:, j])
    return float(((agreement + 1) / 2)[differ].sum()), int(differ.sum())


class RewardWatch:
    """Warns when the process reward no longer orders the policy's samples as the outcome rewards do.

    Guidance and process advantages then push the policy where the outcome rewards do not follow: it has left the
    samples that the model was trained on, or has learned to exploit it.
    """

    def __init__(self, config: WatchConfig, records: Sequence[Mapping[str, float]] = ()) -> None:
        """Starts with the records of a resumed run.

        Args:
            config: window and threshold.
            records: metrics that the run has recorded so far.
        """
        self._config = config
        self._accuracy = {int(r["iteration"]): r[ACCURACY] for r in records if ACCURACY in r}
        self._alarm = False

    def update(self, iteration: int, record: Mapping[str, float], say: Callable[[str], None]) -> dict[str, float]:
        """Adds an iteration, or replaces one that is done again.

        Args:
            iteration: its number.
            record: its metrics.
            say: prints the warning when the alarm goes on.

        Returns:
            ``watch/accuracy``, the mean over the window, and ``watch/alarm``; nothing until the window is full.
        """
        if ACCURACY not in record:
            return {}
        self._accuracy[iteration] = record[ACCURACY]
        window = [value for i, value in sorted(self._accuracy.items()) if i <= iteration][-self._config.window :]
        if len(window) < self._config.window:
            return {}
        accuracy = float(np.mean(window))
        before, self._alarm = self._alarm, accuracy < self._config.min_accuracy
        if self._alarm and not before:
            say(
                f"warning: the process reward orders only {accuracy:.1%} of the policy's sample pairs as the outcome "
                f"rewards do (mean of {len(window)} iterations, rewards.watch.min_accuracy is "
                f"{self._config.min_accuracy}): lower sampler.guidance or rewards.process.weight, or train the process "
                "reward model on the policy's own samples"
            )
        return {"watch/accuracy": accuracy, "watch/alarm": float(self._alarm)}


class RewardFailures:
    """Counts groups that were lost to failed rewards, and applies the rewards' ``on_failure``."""

    def __init__(self, config: RewardsConfig) -> None:
        self._policy: dict[str, str] = {reward.name: reward.on_failure for reward in config.outcome}
        if config.process is not None:
            self._policy["process"] = config.process.on_failure
        self._counts: Counter[str] = Counter()

    def note(self, error: RewardError) -> None:
        """Records the failure of a group.

        Raises:
            RewardError: one of the failed rewards is configured to stop the run.
        """
        self._counts.update(error.rewards)
        for name in error.rewards:
            if self._policy.get(name) == "abort":
                raise RewardError(f"reward {name!r} failed, and its on_failure is abort: {error}", [name]) from error

    def take(self) -> dict[str, float]:
        """Metrics with the failures of each reward since the last call."""
        record = {f"rewards/failures/{name}": float(self._counts[name]) for name in self._policy}
        self._counts.clear()
        return record

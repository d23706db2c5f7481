"""Group-relative advantages from process and outcome rewards (Euphonium, Eq. 16; DanceGRPO, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

# Rewards of equal samples (say, at the first step of a group that shares its noise) differ by rounding alone.
# Dividing that by its own spread would make full-size advantages out of nothing.
RELATIVE_SPREAD = 1e-5
PROCESS = "process"


@dataclass(frozen=True)
class GroupRewards:
    """Rewards of one group.

    Attributes:
        outcome: outcome rewards by name, ``[group]`` each; those of weight 0 may be missing.
        process: process reward that each action is credited with, ``[group, num_steps]``, or None.
    """

    outcome: Mapping[str, Tensor]
    process: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class AdvantageRule:
    """How rewards become advantages.

    Attributes:
        weights: weight of each outcome reward, by name.
        process_weight: weight of the process reward.
        scope: ``group`` divides by the spread within the group, ``global`` by that over all groups of the iteration
            (Flow-GRPO's code); the mean is the group's in both.
        ddof: delta degrees of freedom of the standard deviation.
        eps: added to the standard deviation.
        clip: largest absolute value of an advantage.
        combine: ``advantages`` adds the weighted advantages into one; ``losses`` keeps one a reward, each clipped on
            its own, for a loss of its own (Euphonium's released script).
        thresholds: by name, thresholds of the outcome rewards that become 1 above and 0 elsewhere.
        best_of: train only on this many samples with the highest and as many with the lowest outcome advantage of
            each group; None trains on all.
        baseline: indices of the samples of a group that the others are compared with; none for all.
    """

    weights: Mapping[str, float]
    process_weight: float
    scope: Literal["group", "global"]
    ddof: int
    eps: float
    clip: float
    combine: Literal["advantages", "losses"]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    best_of: int | None = None
    baseline: tuple[int, ...] = ()


@dataclass(frozen=True)
class Advantages:
    """Advantages of one group.

    Attributes:
        values: float32 ``[components, group, num_steps]``; one component, or one a reward.
        samples: indices of the samples to train on, ascending.
        flat: names of the outcome rewards that are equal for all samples of this group.
    """

    values: Tensor
    samples: tuple[int, ...]
    flat: frozenset[str]


def normalise(
    rewards: Tensor, *, ddof: int, eps: float, spread_of: Tensor | None = None, baseline: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Centres rewards over their first dimension and divides them by their spread.

    Args:
        rewards: ``[group, ...]``.
        ddof: delta degrees of freedom of the standard deviation, 0 or 1.
        eps: added to the standard deviation.
        spread_of: rewards ``[samples, ...]`` whose spread is taken instead of the group's own.
        baseline: indices of the samples whose mean is taken; none for that of all. Advantages then need not add up to
            0; the spread stays that of all.

    Returns:
        ``(normalised, has_spread)``: float32 like ``rewards``, zero where the group has no spread; bool ``[...]``.
    """
    values = rewards.double()
    mean = values[list(baseline)].mean(dim=0) if baseline else values.mean(dim=0)
    own = values.std(dim=0, correction=ddof)
    std = own if spread_of is None else spread_of.double().std(dim=0, correction=ddof)
    has_spread = own > eps + RELATIVE_SPREAD * mean.abs()
    return torch.where(has_spread, (values - mean) / (std + eps), 0.0).float(), has_spread


def group_advantages(groups: Sequence[GroupRewards], rule: AdvantageRule) -> list[Advantages]:
    """Advantages ``A_ik = w_p norm_k(r_p(x_ik)) + sum_m w_m norm(r_m(x_i))``, clipped, of sample i at step k.

    Every reward is normalised on its own within its group before it is weighted and added.

    Args:
        groups: rewards of all groups of the iteration; the scope ``global`` needs them together.
        rule: how they are normalised and combined.

    Returns:
        One result a group, in order.

    Raises:
        ValueError: a reward is not finite and must not become an advantage, or all weights are 0.

    Example:
        >>> rewards = GroupRewards({"motion": torch.tensor([0.0, 1.0, 2.0])})
        >>> rule = AdvantageRule(
        ...     weights={"motion": 1.0}, process_weight=0.0, scope="group", ddof=1, eps=0.0, clip=5.0,
        ...     combine="advantages",
        ... )
        >>> (advantages,) = group_advantages([rewards], rule)
        >>> advantages.values.shape  # [components, group, num_steps]
        torch.Size([1, 3, 1])
        >>> advantages.values.flatten().tolist()
        [-1.0, 0.0, 1.0]
    """
    known = {n: w for n, w in rule.weights.items() if w != 0 or all(n in group.outcome for group in groups)}
    rule = replace(rule, weights=known)
    rewards = [_checked(group, rule) for group in groups]
    live = [name for name, weight in rule.weights.items() if weight != 0]
    with_process = rule.process_weight != 0 and rewards[0].process is not None
    if not live and not with_process:
        raise ValueError("advantages need at least one reward whose weight is not 0")
    spread: dict[str, Tensor | None] = dict.fromkeys([*rule.weights, PROCESS])
    if rule.scope == "global":
        spread |= {name: torch.cat([group.outcome[name] for group in rewards]) for name in rule.weights}
        if with_process:
            spread[PROCESS] = torch.cat([group.process for group in rewards if group.process is not None])
    return [_one_group(group, rule, live, with_process, spread) for group in rewards]


def _one_group(
    group: GroupRewards,
    rule: AdvantageRule,
    live: Sequence[str],
    with_process: bool,
    spread: Mapping[str, Tensor | None],
) -> Advantages:
    def normalised(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(values, ddof=rule.ddof, eps=rule.eps, spread_of=spread[name], baseline=rule.baseline)

    outcome, flat = {}, set()
    for name in rule.weights:
        outcome[name], has_spread = normalised(name, group.outcome[name])
        if not bool(has_spread):
            flat.add(name)
    parts = [rule.weights[name] * outcome[name][:, None] for name in live]
    if with_process and group.process is not None:
        process = rule.process_weight * normalised(PROCESS, group.process)[0]
        parts = [part.expand_as(process) for part in parts] + [process]
    stacked = torch.stack(parts)
    if rule.combine == "advantages":
        stacked = stacked.sum(dim=0, keepdim=True)
    size = stacked.shape[1]
    samples = tuple(range(size))
    if rule.best_of is not None and 2 * rule.best_of < size:
        total = torch.stack([rule.weights[name] * outcome[name] for name in outcome]).sum(dim=0)
        order = torch.argsort(total, stable=True).tolist()
        samples = tuple(sorted(order[: rule.best_of] + order[-rule.best_of :]))
    return Advantages(stacked.clamp(-rule.clip, rule.clip), samples, frozenset(flat))


def _checked(group: GroupRewards, rule: AdvantageRule) -> GroupRewards:
    """The group with thresholds applied; raises ValueError if any of its rewards is not finite."""
    outcome = {}
    for name in rule.weights:
        values = group.outcome[name]
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"reward {name!r} is not finite: {values.tolist()}")
        outcome[name] = (values > rule.thresholds[name]).float() if name in rule.thresholds else values
    if group.process is not None and not bool(torch.isfinite(group.process).all()):
        raise ValueError("process rewards are not finite")
    return GroupRewards(outcome, group.process)

"""Group-relative advantages from process and outcome rewards (Euphonium, Eq. 16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Rewards of equal samples (say, at the first step of a group that shares its noise) differ by rounding alone.
# Dividing that by its own spread would make full-size advantages out of nothing.
RELATIVE_SPREAD = 1e-5


@dataclass(frozen=True)
class Advantages:
    """Advantages of one group.

    Attributes:
        values: float32 ``[group, steps]``.
        flat: names of the outcome rewards without spread in this group.
    """

    values: Tensor
    flat: frozenset[str]


def normalise(rewards: Tensor, *, ddof: int, eps: float) -> tuple[Tensor, Tensor]:
    """Centres and scales rewards over their first dimension.

    Args:
        rewards: ``[group, ...]``.
        ddof: delta degrees of freedom of the standard deviation, 0 or 1.
        eps: added to the standard deviation.

    Returns:
        ``(normalised, has_spread)``: float32 like ``rewards``, zero where there is no spread; bool ``[...]``.
    """
    values = rewards.double()
    mean = values.mean(dim=0)
    std = values.std(dim=0, correction=ddof)
    has_spread = std > eps + RELATIVE_SPREAD * mean.abs()
    return torch.where(has_spread, (values - mean) / (std + eps), 0.0).float(), has_spread


def group_advantages(
    outcome: Mapping[str, Tensor],
    weights: Mapping[str, float],
    process: Tensor | None,
    process_weight: float,
    *,
    num_steps: int,
    ddof: int = 1,
    eps: float = 1e-8,
    clip: float = 5.0,
) -> Advantages:
    """``A_ik = w_p norm_k(r_p(x_ik)) + sum_m w_m norm(r_m(x_i))``, clipped.

    Every reward is normalised on its own over the group before it is weighted and added.

    Args:
        outcome: per reward, ``[group]``.
        weights: weight of every outcome reward.
        process: ``[group, num_steps]`` process rewards of the states that the actions leave, or None.
        process_weight: weight of the process advantage.
        num_steps: number of sampling steps.
        ddof: see :func:`normalise`.
        eps: see :func:`normalise`.
        clip: absolute bound of the sum.

    Raises:
        ValueError: a reward that is not finite, which must never become an advantage.
    """
    total: Tensor | None = None
    flat = set()
    for name, rewards in outcome.items():
        if not bool(torch.isfinite(rewards).all()):
            raise ValueError(f"reward {name!r} is not finite: {rewards.tolist()}")
        normalised, has_spread = normalise(rewards, ddof=ddof, eps=eps)
        if not bool(has_spread):
            flat.add(name)
        part = weights[name] * normalised[:, None].expand(-1, num_steps)
        total = part if total is None else total + part
    if process is not None and process_weight != 0:
        if not bool(torch.isfinite(process).all()):
            raise ValueError("process rewards are not finite")
        part = process_weight * normalise(process, ddof=ddof, eps=eps)[0]
        total = part if total is None else total + part
    if total is None:
        raise ValueError("advantages need at least one reward")
    return Advantages(total.clamp(-clip, clip), frozenset(flat))

"""Cuts groups into micro-batches, the same number for every rank.

Under ZeRO-3 every rank takes part in every forward and backward pass, so all ranks must run the same number of
micro-batches: a rank with fewer repeats one with weight 0. No number has to be a multiple of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from euphonium.generators.conditioning import expand
from euphonium.wire.arrays import as_tensor
from euphonium.wire.records import Array, GroupPayload, TrainingGroup
from learners.policy.objective import Transitions


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """States ``begin:end`` of one group, with all rows that leave them.

    A row is a transition of a sample. The network sees a state once, however many samples leave it: with shared initial
    noise, that is the first trained one. States are ordered sample by sample, the shared one before all.

    Attributes:
        group: position of the group in the iteration.
        begin: first state.
        end: one past the last state.
        weight: weight of each row in the loss; 0 for padding.
    """

    group: int
    begin: int
    end: int
    weight: float


# ``shares[rank]``: a rank's micro-batches in an update.
Shares = list[list[MicroBatch]]
# ``plan[update]``: its shares.
Plan = list[Shares]


def dealt(groups: int, updates: int) -> list[range]:
    """Positions of the groups of each update of an iteration: they are dealt to the updates in turn.

    >>> [list(positions) for positions in dealt(groups=5, updates=2)]
    [[0, 2, 4], [1, 3]]
    """
    count = min(updates, groups)
    return [range(update, groups, count) for update in range(count)]


def plan_updates(sizes: Sequence[tuple[int, int]], updates: int, states_per_micro_batch: int, world_size: int) -> Plan:
    """Plans the micro-batches of all updates of an iteration.

    A micro-batch never mixes groups. Ranks take them in turn, in the order of the groups: who computes what, and in
    which order it adds up, does not depend on how many groups are there when the work begins (:func:`plan_beginning`).
    The loss of an update is the mean over its rows: ``weight`` is ``world_size / rows``, because gradients are averaged
    over the ranks.

    Args:
        sizes: number of rows of each group, and of the different states that the network sees; of each update, at least
            one group has a state.
        updates: number of optimiser steps; fewer are planned if there are fewer groups.
        states_per_micro_batch: largest micro-batch.
        world_size: number of ranks.

    Returns:
        ``plan[update][rank]``: the rank's micro-batches, equally many on every rank.

    Example:
        >>> (update,) = plan_updates([(5, 5), (2, 2)], updates=1, states_per_micro_batch=3, world_size=2)
        >>> for rank, batches in enumerate(update):
        ...     print(rank, [(b.group, b.begin, b.end, round(b.weight, 2)) for b in batches])
        0 [(0, 0, 3, 0.29), (1, 0, 2, 0.29)]
        1 [(0, 3, 5, 0.29), (0, 3, 5, 0.0)]
        >>> round(sum((b.end - b.begin) * b.weight for batches in update for b in batches), 6)  # the world size
        2.0
    """
    plan = []
    for positions in dealt(len(sizes), updates):
        weight = world_size / sum(sizes[position][0] for position in positions)
        pieces = _pieces(sizes, positions, states_per_micro_batch, weight)
        if not pieces:
            raise ValueError("an update without a micro-batch would move no weights, not even by weight decay")
        shares = [pieces[rank::world_size] for rank in range(world_size)]
        for share in shares:
            if len(share) < len(shares[0]):
                share.append(replace(share[0] if share else pieces[0], weight=0.0))
        plan.append(shares)
    return plan


def plan_beginning(
    sizes: Sequence[tuple[int, int]], expected: int, updates: int, states_per_micro_batch: int, world_size: int
) -> Shares:
    """The micro-batches of the first update that can be computed while the last groups are still to come.

    Args:
        sizes: as for :func:`plan_updates`, of the groups that are there, which are the first ones of the iteration.
        expected: number of groups that the iteration will have, each with as many rows as the first.
        updates: number of optimiser steps.
        states_per_micro_batch: largest micro-batch.
        world_size: number of ranks.

    Returns:
        ``shares[rank]``: what the plan of the whole iteration begins with, equally many on every rank. The last
        micro-batch of each rank is never among them: it is the one that moves the weights.

    Example:
        >>> (share,) = plan_beginning([(2, 2)] * 3, expected=4, updates=1, states_per_micro_batch=2, world_size=1)
        >>> [(b.group, b.begin, b.end, b.weight) for b in share]
        [(0, 0, 2, 0.125), (1, 0, 2, 0.125)]
    """
    first = dealt(expected, updates)[0]
    there = [position for position in first if position < len(sizes)]
    pieces = _pieces(sizes, there, states_per_micro_batch, world_size / (sizes[0][0] * len(first)))
    whole = max(0, len(pieces) - 1) // world_size
    return [pieces[rank::world_size][:whole] for rank in range(world_size)]


def _pieces(
    sizes: Sequence[tuple[int, int]], positions: Iterable[int], states_per_micro_batch: int, weight: float
) -> list[MicroBatch]:
    return [
        MicroBatch(
            group=position, begin=begin, end=min(begin + states_per_micro_batch, sizes[position][1]), weight=weight
        )
        for position in positions
        for begin in range(0, sizes[position][1], states_per_micro_batch)
    ]


def load_rows(
    batch: MicroBatch, group: TrainingGroup, payload: GroupPayload, device: torch.device, *, guided_mean: bool = True
) -> Transitions:
    """Selects the rows of a micro-batch from its group.

    Args:
        batch: which states, counted over those that trained transitions leave.
        group: the group, with advantages.
        payload: the group's transitions.
        device: device that the learner computes on.
        guided_mean: whether the payload's gradients belong to the mean.
    """
    kept = payload.steps.shape[1]
    states, of = np.unique(payload.rows[group.samples], return_inverse=True)
    of = of.ravel()
    order = np.argsort(of, kind="stable")
    order = order[np.searchsorted(of[order], batch.begin) : np.searchsorted(of[order], batch.end)]
    samples, columns = group.samples[order // kept], order % kept
    flat = samples * kept + columns

    def rows_of(array: Array) -> torch.Tensor:
        return _taken(array.reshape(-1, *array.shape[2:]), flat).to(device)

    conditioning = {name: as_tensor(array).to(device) for name, array in payload.conditioning.items()}
    steps = payload.steps[samples, columns]
    return Transitions(
        states=_taken(payload.states, states[batch.begin : batch.end]).to(device),
        of=torch.from_numpy(of[order] - batch.begin).to(device),
        next_states=_taken(payload.states, payload.next_rows[samples, columns]).to(device),
        steps=torch.from_numpy(np.ascontiguousarray(steps)).long(),
        log_probs=rows_of(payload.log_probs),
        advantages=torch.from_numpy(np.ascontiguousarray(group.advantages[:, samples, steps])).to(device),
        gradients=None if payload.gradients is None else rows_of(payload.gradients),
        conditioning=expand(conditioning, batch.end - batch.begin),
        weight=batch.weight,
        guided_mean=guided_mean,
    )


def _taken(array: Array, index: NDArray[np.int64]) -> torch.Tensor:
    """Rows of an array: a view if they follow each other, as those of one sample do; else a copy."""
    if np.all(np.diff(index) == 1):
        return as_tensor(array[index[0] : index[-1] + 1])
    return torch.from_numpy(array[index])

"""A drawn group as it leaves its actor: its transitions, its process rewards; and one from parts, put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from actors.sampler import Trajectory, credited_steps
from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import TrainingError
from euphonium.generators.conditioning import Conditioning
from euphonium.wire.arrays import as_array, as_tensor
from euphonium.wire.records import Array, GroupInfo, GroupPayload

# Where the states of rows are stored, where those that follow, and their number, from the steps ``[group, K]``.
Places = Callable[[Tensor], tuple[Tensor, Tensor, int]]


def payload_of(trajectory: Trajectory, conditioning: Conditioning) -> GroupPayload:
    """The trained transitions as arrays."""
    return GroupPayload(
        states=trajectory.states.numpy(),
        rows=trajectory.rows.numpy(),
        next_rows=trajectory.next_rows.numpy(),
        steps=trajectory.steps.numpy(),
        log_probs=trajectory.log_probs.numpy(),
        gradients=None if trajectory.gradients is None else trajectory.gradients.numpy(),
        conditioning={name: as_array(tensor) for name, tensor in conditioning.items()},
    )


def final_rewards(config: RunConfig, rewards: Tensor | None) -> Array | None:
    """Process rewards of the finished samples, ``[group]``, where they count as an outcome reward."""
    if rewards is None or not config.scores_final_states:
        return None
    return np.ascontiguousarray(rewards[:, -1].numpy())


def credited_rewards(config: RunConfig, rewards: Tensor | None, table: StepTable) -> Array | None:
    """The process reward that each action is credited with, ``[group, num_steps]``, from those of all states."""
    process = config.rewards.process
    if rewards is None or process is None:
        return None
    before, after = rewards[:, :-1], rewards[:, 1:]
    credited = after if process.credit == "next_state" else before
    if process.credit == "progress":
        credited = torch.zeros_like(before)
        steps = credited_steps(process, table)
        credited[:, steps] = after[:, steps] - before[:, steps]
    return np.ascontiguousarray(credited.numpy())


def put_together(
    infos: Sequence[GroupInfo], latents: Sequence[Array], payloads: Sequence[GroupPayload], places: Places
) -> tuple[GroupInfo, Array, GroupPayload]:
    """A group whose samples were drawn in parts, as if they had been drawn together.

    Args:
        infos: descriptions of the parts, in the order of their samples.
        latents: their final latents.
        payloads: their transitions.
        places: where the states of the whole group are stored.

    Raises:
        TrainingError: the parts were drawn by different policy versions.
    """
    versions = {info.policy_version for info in infos}
    if len(versions) > 1:
        raise TrainingError(f"parts of group {infos[0].task.group_id} were drawn by policy versions {sorted(versions)}")
    payload = _payload_of_parts(payloads, places)
    task = dataclasses.replace(infos[0].task, members=None)
    info = dataclasses.replace(
        infos[0],
        task=task,
        rows=payload.rows,
        process_rewards=_joined([info.process_rewards for info in infos]),
        final_rewards=_joined([info.final_rewards for info in infos]),
        seconds={part: _seconds(part, infos) for part in infos[0].seconds},
        payload_bytes=payload.nbytes,
        reused=float(np.mean([info.reused for info in infos])),
    )
    return info, np.concatenate(latents), payload


def leave_one_state(payloads: Sequence[GroupPayload], k: int) -> bool:
    """Whether all trained transitions of step k leave the same state, in all parts of a group."""
    left = np.concatenate([part.states[part.rows[part.steps == k]] for part in payloads])
    return bool((left == left[:1]).all())


def _payload_of_parts(payloads: Sequence[GroupPayload], places: Places) -> GroupPayload:
    steps = np.concatenate([part.steps for part in payloads])
    rows, next_rows, count = places(as_tensor(steps))
    states = np.empty((count, *payloads[0].states.shape[1:]), payloads[0].states.dtype)
    first = 0
    for part in payloads:
        members = slice(first, first := first + len(part.steps))
        states[rows[members].numpy()] = part.states[part.rows]
        states[next_rows[members].numpy()] = part.states[part.next_rows]
    return GroupPayload(
        states=states,
        rows=rows.numpy(),
        next_rows=next_rows.numpy(),
        steps=steps,
        log_probs=np.concatenate([part.log_probs for part in payloads]),
        gradients=_joined([part.gradients for part in payloads]),
        conditioning=payloads[0].conditioning,
    )


def _joined(parts: Sequence[Array | None]) -> Array | None:
    """Values of all samples, None if there are none; all parts have them or none has."""
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


def _seconds(part: str, infos: Sequence[GroupInfo]) -> float:
    """Seconds of a part of the work: those of all actors, but what was waited for weights was waited at once."""
    each = [info.seconds[part] for info in infos]
    return max(each) if part == "weights" else sum(each)

"""What of a group is trained: transitions of its trajectories, or its finished samples, noised again.

The second serves the objectives that need no likelihood (:mod:`euphonium.dynamics.forward_process`). Their rows have
the form of transitions: ``x_k`` is a sample at the noise level of step k, and ``x_{k+1}`` is the sample itself. So they
travel, are dealt to ranks and are counted like those.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from actors.members import Members
from actors.sampler import Trajectory, drawn_steps, last_shared_state, select_steps, state_rows
from euphonium.config import RunConfig
from euphonium.dynamics import StepTable


def trained_steps(config: RunConfig, table: StepTable, seed: int) -> Tensor:
    """Steps that are trained of every sample of a group, or noise levels at which its finished samples are.

    Args:
        config: the recipe.
        table: the group's sampler.
        seed: of the draw.

    Returns:
        int64 ``[group, K]``, each row sorted. The samples of DPO's pairs have the same.

    Raises:
        ConfigError: no step with noise may be trained.
    """
    objective, size = config.objective, config.rollout.group_size
    if not objective.noises_samples:
        return select_steps(
            table, size, objective.timestep_fraction, seed, objective.trained_steps, objective.trained_every
        )
    levels = range(*(objective.trained_steps or (0, table.num_steps)))[:: objective.trained_every]
    if objective.kind == "dpo":
        return drawn_steps(levels, 1, objective.timestep_fraction, seed).expand(size, -1)
    return drawn_steps(levels, size, objective.timestep_fraction, seed)


def stored_states(config: RunConfig, table: StepTable, steps: Tensor) -> tuple[Tensor, int]:
    """Where the states of the rows are, int64 ``[group, K]``, and how many states are stored with them."""
    rows, _, count = state_places(config, table, steps)
    return rows, count


def state_places(
    config: RunConfig, table: StepTable, steps: Tensor, *, alike: bool = True
) -> tuple[Tensor, Tensor, int]:
    """Where the states of a group's rows are stored, and where those that follow; and how many states there are.

    Args:
        config: the recipe.
        table: the group's sampler.
        steps: int64 ``[group, K]``, k of the rows.
        alike: whether samples that start alike are alike up to the first noise, and share that state.
    """
    if config.objective.noises_samples:
        return (*noised_rows(steps), steps.numel() + len(steps))
    return state_rows(steps, last_shared_state(config, table) if alike else None)


def noised_rows(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Where x_k and the sample itself are among the states of noised samples: level by level, then the samples.

    Samples of a level follow each other, so that a micro-batch of an even size holds DPO's pairs whole.

    Example:
        >>> noised_rows(torch.tensor([[0, 3], [0, 3]]))
        (tensor([[0, 2],
                [1, 3]]), tensor([[4, 4],
                [5, 5]]))
    """
    size, levels = steps.shape
    rows = torch.arange(levels * size).view(levels, size).T.contiguous()
    return rows, (levels * size + torch.arange(size))[:, None].expand(size, levels).contiguous()


def noised_again(
    config: RunConfig, trajectory: Trajectory, table: StepTable, steps: Tensor, seed: int, members: Members
) -> Trajectory:
    """The trajectories with rows of their finished samples in the place of transitions.

    Args:
        config: the recipe; with DPO all samples of the group get the same noise at a level.
        trajectory: how the samples were drawn.
        table: the sampler, whose noise levels they get.
        steps: int64 ``[samples, K]``, the levels of every sample.
        seed: of the noise, which is drawn on the CPU: a seed means the same on every device.
        members: which samples of the group these are.
    """
    samples = trajectory.final.float().cpu()
    rows, data_rows = noised_rows(steps)
    generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, 2]).integers(2**63)))
    noisy = Members.all(1) if config.objective.kind == "dpo" else members
    noise = noisy.noise((steps.shape[1], noisy.count, *samples.shape[1:]), generator, dim=1)
    noise = noise.expand(-1, len(samples), *samples.shape[1:]).flatten(0, 1)
    clean = samples.repeat(steps.shape[1], *[1] * (samples.dim() - 1))
    noised = table.noised(steps.T.flatten(), clean, noise)
    return dataclasses.replace(
        trajectory, states=torch.cat([noised, samples]), rows=rows, next_rows=data_rows, steps=steps,
        log_probs=torch.zeros(steps.shape), gradients=None,
    )  # fmt: skip

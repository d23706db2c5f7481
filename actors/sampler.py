"""Draws one group of trajectories: the guided sampling loop, without Ray.

At every step the process reward (and in the guided window its gradient) and the velocity are functions of the same
state, so the request to the process-reward source is sent first and its answer is awaited after the velocity has
been computed: with a server of its own, guidance costs next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from euphonium.dynamics import StepTable

Velocity = Callable[[Tensor, float], Tensor]


class Pending(Protocol):
    """An answer of a process-reward source that may still be under way."""

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Rewards ``[batch]`` and gradient like the state, None if none was asked for; waits if it must."""
        ...


class ProcessRewardSource(Protocol):
    """Whoever scores states: a server, or a model in this process."""

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Pending:
        """Asks for the rewards of states ``[batch, *latent]`` at the noise level of step k.

        ``k = num_steps`` is the end of the walk, noise level ``sigmas[-1]``.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What sampling a group yields.

    Attributes:
        final: float32 ``[group, *latent]``, the samples.
        states: float32 ``[group, K, *latent]``, x_k of the kept transitions.
        next_states: like ``states``, x_{k+1}.
        steps: int64 ``[group, K]``.
        log_probs: float32 ``[group, K]``.
        gradients: like ``states``, or None.
        process_rewards: float32 ``[group, num_steps + 1]``, of every state of the walk; 0 where none was asked for.
            None if none was asked for at all.
        seconds: time by part: ``velocity``, and ``process_reward`` for what was waited after the velocity was ready.
    """

    final: Tensor
    states: Tensor
    next_states: Tensor
    steps: Tensor
    log_probs: Tensor
    gradients: Tensor | None
    process_rewards: Tensor | None
    seconds: dict[str, float]


def initial_noise(
    shape: tuple[int, ...], group_size: int, seed: int, *, shared: bool, device: torch.device
) -> tuple[Tensor, torch.Generator]:
    """Starting states ``[group_size, *shape]`` and the generator that the steps draw on from there.

    Drawn on the CPU, so that a seed means the same samples on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 1 if shared else group_size
    noise = torch.randn((count, *shape), generator=generator)
    return noise.expand(group_size, *shape).clone().to(device), generator


def select_steps(table: StepTable, group_size: int, fraction: float, seed: int) -> Tensor:
    """Trained steps of every sample: a random share of the stochastic ones (DanceGRPO's tau).

    Returns:
        int64 ``[group_size, K]``, each row sorted, K = ceil(fraction * stochastic steps).
    """
    candidates = np.array(table.stochastic_steps)
    count = max(1, int(np.ceil(fraction * len(candidates) - 1e-9)))
    draws = np.random.default_rng([seed, 1])
    rows = [np.sort(draws.permutation(candidates)[:count]) for _ in range(group_size)]
    return torch.from_numpy(np.stack(rows)).long()


@torch.no_grad()
def sample_group(
    table: StepTable,
    velocity: Velocity,
    start: Tensor,
    noise: torch.Generator,
    *,
    kept_steps: Tensor,
    process_reward: ProcessRewardSource | None = None,
    scored_states: Collection[int] = (),
    normalise_gradient: bool = False,
    guided_mean_in_log_prob: bool = False,
) -> Trajectory:
    """Walks a group from noise to data under the law and guidance of a table.

    Args:
        table: the sampler.
        velocity: network output at a state and a time (:attr:`euphonium.dynamics.StepTable.times`).
        start: float32 ``[group, *latent]``.
        noise: CPU generator of the transitions' noise.
        kept_steps: int64 ``[group, K]``, transitions to keep of every sample.
        process_reward: source of process rewards; needed when the table is guided or states are scored.
        scored_states: states, 0 to ``num_steps``, whose process reward is wanted besides those of guided steps.
        normalise_gradient: scale every sample's gradient to unit length.
        guided_mean_in_log_prob: score transitions under the mean with guidance (``objective: standard``), and keep
            the gradients that enter it; otherwise under the mean without (``distill``).

    Returns:
        The trajectory; states are kept and scored in float32.
    """
    guided = set(table.guided_steps)
    wanted = guided | set(scored_states)
    if wanted and process_reward is None:
        raise ValueError("a guided table or process rewards need a source of process rewards")
    x = start
    group, kept = kept_steps.shape
    shape = (group, kept, *start.shape[1:])
    states, next_states = torch.empty(shape), torch.empty(shape)
    log_probs = torch.empty(group, kept)
    gradients = torch.zeros(shape) if guided_mean_in_log_prob and guided else None
    answers: dict[int, Pending] = {}
    seconds = {"velocity": 0.0, "process_reward": 0.0}
    for k in range(table.num_steps):
        if process_reward is not None and k in wanted:
            answers[k] = process_reward.submit(k, x, with_gradient=k in guided)
        began = time.perf_counter()
        v = velocity(x, float(table.times[k]))
        ready = time.perf_counter()
        gradient = answers[k].result()[1] if k in guided else None
        if gradient is not None and normalise_gradient:
            gradient = _unit_length(gradient)
        seconds["velocity"] += ready - began
        seconds["process_reward"] += time.perf_counter() - ready

        mean = table.mean(k, x, v)
        sampled_mean = mean if gradient is None else table.mean(k, x, v, gradient)
        x_next = sampled_mean
        if float(table.std[k]) > 0:
            z = torch.randn(x.shape, generator=noise).to(x.device)
            x_next = table.sample(k, sampled_mean, z)
            rows, columns = torch.nonzero(kept_steps == k, as_tuple=True)
            if len(rows):
                scored = sampled_mean if guided_mean_in_log_prob else mean
                log_probs[rows, columns] = table.log_prob(k, x_next, scored)[rows].cpu()
                states[rows, columns] = x[rows].cpu()
                next_states[rows, columns] = x_next[rows].cpu()
                if gradients is not None and gradient is not None:
                    gradients[rows, columns] = gradient[rows].cpu()
        x = x_next
    if process_reward is not None and table.num_steps in wanted:
        answers[table.num_steps] = process_reward.submit(table.num_steps, x, with_gradient=False)
    rewards = None
    if wanted:
        began = time.perf_counter()
        rewards = torch.zeros(group, table.num_steps + 1)
        for k, answer in answers.items():
            rewards[:, k] = answer.result()[0].cpu()
        seconds["process_reward"] += time.perf_counter() - began
    return Trajectory(
        final=x, states=states, next_states=next_states, steps=kept_steps, log_probs=log_probs,
        gradients=gradients, process_rewards=rewards, seconds=seconds,
    )  # fmt: skip


@torch.no_grad()
def sample_deterministic(
    table: StepTable,
    velocity: Velocity,
    start: Tensor,
    process_reward: ProcessRewardSource | None = None,
    *,
    normalise_gradient: bool = False,
) -> Tensor:
    """Samples of a table without noise: what evaluation and the exported model use.

    Args:
        table: of the law ``ode``; with guidance, samples keep the process-reward gradient (the paper's ``Inference
            RGG``).
        velocity: as for :func:`sample_group`.
        start: float32 ``[batch, *latent]``.
        process_reward: needed when the table is guided.
        normalise_gradient: as for :func:`sample_group`.
    """
    guided = set(table.guided_steps)
    x = start
    for k in range(table.num_steps):
        pending = None
        if process_reward is not None and k in guided:
            pending = process_reward.submit(k, x, with_gradient=True)
        v = velocity(x, float(table.times[k]))
        gradient = None if pending is None else pending.result()[1]
        if gradient is not None and normalise_gradient:
            gradient = _unit_length(gradient)
        x = table.mean(k, x, v, gradient)
    return x


def _unit_length(gradient: Tensor) -> Tensor:
    norms = gradient.flatten(1).norm(dim=1).clamp(min=1e-8)
    return gradient / norms.view(-1, *[1] * (gradient.dim() - 1))

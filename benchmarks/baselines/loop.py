"""The loop that published trainers share: draw and score all groups in full, then update; one step after another.

Network, step table, rewards, advantages, loss and optimizer are this project's. What is theirs is the order and size of
the passes: every sample goes through every step by itself, also where all samples of a group are in the same state; a
training pass is one step of a batch of samples; nothing overlaps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from actors.sampler import initial_noise, select_steps
from benchmarks.single_process import SingleProcess
from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.generators.conditioning import Conditioning, expand
from euphonium.wire.records import Array, GroupInfo, GroupTask
from learners.policy.batching import dealt
from learners.policy.objective import References, Transitions, evaluate_objective
from learners.policy.schedules import kl_weight, learning_rate
from orchestrator.groups.credit import advantages


@dataclass(frozen=True, kw_only=True)
class Practice:
    """How a trainer goes about it.

    Attributes:
        name: of the method.
        recipe: its recipe here.
        source: where that is to be read.
        batch: samples in a pass of drawing and training; None takes a group.
        scored_alone: whether every sample is decoded and scored by itself.
        leaves_out_zeros: whether samples without an advantage are left out of the training.
    """

    name: str
    recipe: str
    source: str
    batch: int | None = None
    scored_alone: bool = False
    leaves_out_zeros: bool = False


@dataclass(frozen=True)
class Drawn:
    """A group in full: ``states`` is ``[steps + 1, group, *latent]``, ``log_probs`` ``[steps, group]``."""

    info: GroupInfo
    table: StepTable
    conditioning: Conditioning
    kept: Tensor
    states: Tensor
    log_probs: Tensor
    scores: dict[str, Array]


class PublishedLoop(SingleProcess):
    """One training run by a trainer's practice; without guidance and process rewards, which none of them has."""

    def __init__(self, config: RunConfig, practice: Practice) -> None:
        super().__init__(config)
        self.practice = practice
        self._batch = practice.batch or config.rollout.group_size

    @override
    def iterate(self) -> dict[str, float]:
        """Draws, scores and trains on one iteration's groups."""
        began = time.perf_counter()
        count = self.config.rollout.prompts_per_iteration
        iteration = self.groups // count
        groups = []
        for _ in range(count):
            groups.append(self._drawn(self.prompts.task(self.groups, iteration)))
            self.groups += 1
        results = advantages(self.config, [g.info for g in groups], [g.scores for g in groups])
        values = [result.values.expand(-1, -1, self.config.sampler.num_steps) for result in results]
        drawn = time.perf_counter()
        norms = self._trained(groups, values)
        return {
            "time/rollout_s": drawn - began, "time/update_s": time.perf_counter() - drawn,
            "policy/grad_norm": float(np.mean(norms)),
        }  # fmt: skip

    @torch.no_grad()
    def _drawn(self, task: GroupTask) -> Drawn:
        config, size = self.config, self.config.rollout.group_size
        table, conditioning = self.worker.table(task.iteration), self.worker.conditioning(task.prompt)
        shared, family = config.sampler.shared_noise, self.worker.family
        start, noise = initial_noise(family.latent_shape, size, task.seed, shared=shared, device=self.device)
        # The noise of a step is drawn for the whole group, so that all ways of drawing give the same samples.
        noises = [
            torch.randn(start.shape, generator=noise) if float(table.std[k]) > 0 else torch.zeros_like(start)
            for k in range(table.num_steps)
        ]
        parts = [slice(i, i + self._batch) for i in range(0, size, self._batch)]
        walked = [self._walked(table, conditioning, start[part], [n[part] for n in noises]) for part in parts]
        states = torch.cat([states for states, _ in walked], dim=1)
        each = 1 if self.practice.scored_alone else size
        answers = [self.orm.score(states[-1][i : i + each].numpy(), [task.prompt] * each) for i in range(0, size, each)]
        kept = select_steps(table, size, config.objective.timestep_fraction, task.seed)
        info = GroupInfo(
            task=task, policy_version=0, fingerprint=table.fingerprint(),
            rows=np.arange(kept.numel()).reshape(kept.shape), process_rewards=None, seconds={}, payload_bytes=0,
        )  # fmt: skip
        scores = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
        return Drawn(info, table, conditioning, kept, states, torch.cat([logs for _, logs in walked], dim=1), scores)

    def _walked(
        self, table: StepTable, conditioning: Conditioning, x: Tensor, noises: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """All states of some samples, and the log-probabilities of their steps."""
        states, logs = [x], []
        for k in range(table.num_steps):
            mean = table.mean(k, x, self._output(x, table, k, conditioning))
            stochastic = float(table.std[k]) > 0
            x = table.sample(k, mean, noises[k]) if stochastic else mean
            states.append(x)
            logs.append(table.log_prob(k, x, mean) if stochastic else torch.zeros(len(x)))
        return torch.stack(states), torch.stack(logs)

    def _output(self, x: Tensor, table: StepTable, k: int, conditioning: Conditioning) -> Tensor:
        times = torch.full((len(x),), float(table.times[k]))
        return self.worker.family.velocity(self.policy, x, times, expand(conditioning, len(x)))

    def _trained(self, groups: list[Drawn], values: list[Tensor]) -> list[float]:
        """All updates; the gradient norms."""
        config, norms = self.config, []
        self.policy.requires_grad_(True)
        for positions in dealt(len(groups), config.objective.updates_per_iteration):
            for options in self.optimizer.param_groups:
                options["lr"] = learning_rate(config, self.updates)
            self.optimizer.zero_grad(set_to_none=True)
            weight = 1 / sum(groups[position].kept.numel() for position in positions)
            references = References(
                anchor=self._velocity(self.anchor), kl_weight=kl_weight(config.objective.kl, self.controller)
            )
            for position in positions:
                self._backward(groups[position], values[position], weight, references)
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_grad_norm)))
            self.optimizer.step()
            self.updates += 1
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - config.optimizer.ema_decay)
        self.policy.requires_grad_(False)
        return norms

    def _backward(self, group: Drawn, values: Tensor, weight: float, references: References) -> None:
        """Adds up a group's gradients: a batch of samples, one trained step of each at a time."""
        samples = torch.arange(len(group.kept))
        if self.practice.leaves_out_zeros:
            samples = samples[values.ne(0).any(dim=2).any(dim=0)]
        for chosen in samples.split(self._batch):
            for column in range(group.kept.shape[1]):
                steps = group.kept[chosen, column]
                rows = Transitions(
                    states=group.states[steps, chosen], next_states=group.states[steps + 1, chosen], steps=steps,
                    log_probs=group.log_probs[steps, chosen], advantages=values[:, chosen, steps], gradients=None,
                    conditioning=expand(group.conditioning, len(chosen)), weight=weight,
                )  # fmt: skip
                value = evaluate_objective(self.config.objective, group.table, self._policy, rows, references)
                value.loss.backward()

    def _policy(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.worker.family.velocity(self.policy, x, time, conditioning)

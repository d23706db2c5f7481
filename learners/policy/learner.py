"""One rank of the learner group: the policy under ZeRO-3, its frozen references, and the updates of an iteration.

It knows neither Ray nor the mailbox; train_loop.py fetches orders and calls it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import TrainingError
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.registry import open_generator
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.engine.collectives import reduced
from learners.engine.partitioned import ZeroPolicy
from learners.policy.batching import MicroBatch, load_rows, plan_updates
from learners.policy.objective import References, Transitions, evaluate_objective, replayed_log_probs
from learners.policy.publication import Publisher
from learners.policy.references import AdapterReference, FrozenCopy, Reference
from learners.policy.schedules import kl_controller, kl_weight, learning_rate
from learners.policy.statistics import UpdateStatistics


class Learner:
    """One rank of the learner group, without Ray.

    Attributes:
        policy: the transformer under ZeRO-3.
        anchor: frozen reference of the KL penalty, or None.
        previous: copy of the policy that drew the groups, if its means are needed, or None.
        controller: controller of the KL penalty's weight, or None.
        updates_done: number of optimiser steps so far.
        version: policy version, which is the number of iterations trained.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: torch.device) -> None:
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.family = open_generator(config.model)
        objective, pool = config.objective, config.pools.learner
        kl = objective.kl
        adapters = [
            name
            for name, wanted in (
                ("anchor", kl is not None and kl.anchor == "moving"),
                ("previous", objective.needs_previous_policy),
            )
            if wanted
        ]
        self.policy = ZeroPolicy(self.family, pool, config.optimizer, config.model.lora, adapters)
        self.anchor: Reference | None = None
        if kl is not None and kl.anchor != "none":
            self.anchor = self._reference("anchor" if kl.anchor == "moving" else None)
        self.previous = self._reference("previous") if objective.needs_previous_policy else None
        self.controller = kl_controller(kl)
        self.publisher = Publisher(config, rank, device, self.policy)
        self.updates_done = 0
        self.version = 0

    def _reference(self, adapter: str | None) -> Reference:
        if self.config.model.lora is not None:
            return AdapterReference(self.family, self.policy, adapter)
        return FrozenCopy(self.family, self.config.pools.learner, self.policy)

    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of the policy in training, with gradients."""
        return self.family.velocity(self.policy.model, x, time, conditioning)

    def groups_needed(self, groups: Sequence[TrainingGroup]) -> set[int]:
        """Positions of the groups from which this rank trains at least one row."""
        return {batch.group for shares in self._plan(groups) for batch in shares[self.rank]}

    def update(self, groups: Sequence[TrainingGroup], payloads: Mapping[int, GroupPayload]) -> dict[str, float]:
        """Makes all updates of an iteration; all ranks must call it.

        Args:
            groups: the iteration's groups.
            payloads: transitions of the groups that this rank needs, by position.

        Returns:
            Metrics, reduced over all ranks.

        Raises:
            TrainingError: a group was drawn by another sampler, or the first update's importance ratios are not 1, so
                that rollout and learner disagree on the policy.
        """
        tables = {position: self._table_of(position, groups[position]) for position in payloads}
        plan = self._plan(groups)
        if self.previous is not None:
            self.previous.refresh(self.policy)
        cut = partial(self._rows, groups, payloads)
        replayed = self._replay(plan, cut, tables) if self.config.objective.old_log_probs == "replay" else {}
        statistics = UpdateStatistics(self.world_size)
        for index, shares in enumerate(plan):
            statistics.begin_update()
            self.policy.set_learning_rate(learning_rate(self.config, self.updates_done))
            references = self._references()
            own = shares[self.rank]
            for position, batch in enumerate(own):
                rows = cut(batch)
                if (index, position) in replayed:
                    rows = dataclasses.replace(rows, log_probs=replayed[index, position])
                value = evaluate_objective(self.config.objective, tables[batch.group], self.velocity, rows, references)
                self.policy.backward(value.loss, last=position == len(own) - 1)
                if batch.weight > 0:
                    # Ratios must be 1 only on the first update, and only for groups that the present policy drew.
                    first = index == 0 and groups[batch.group].info.policy_version == self.version
                    statistics.add(value, on_policy=first)
            self.updates_done += 1
            statistics.norms.append(self.policy.grad_norm())
            self._after_update(statistics.of_this_update())
        metrics = statistics.reduced(self.device)
        self._check_ratio(metrics["policy/ratio_deviation"])
        metrics |= {
            "policy/learning_rate": learning_rate(self.config, self.updates_done - 1),
            "policy/updates": float(self.updates_done),
        }
        if self.config.objective.kl is not None:
            return metrics | {"kl/weight": references.kl_weight}
        return {name: number for name, number in metrics.items() if not name.startswith("kl/")}

    def _plan(self, groups: Sequence[TrainingGroup]) -> list[list[list[MicroBatch]]]:
        return plan_updates(
            [group.rows for group in groups],
            self.config.objective.updates_per_iteration,
            self.config.pools.learner.rows_per_micro_batch,
            self.world_size,
        )

    def _rows(
        self, groups: Sequence[TrainingGroup], payloads: Mapping[int, GroupPayload], batch: MicroBatch
    ) -> Transitions:
        return load_rows(batch, groups[batch.group], payloads[batch.group], self.device)

    def _references(self) -> References:
        return References(
            anchor=self.anchor.velocity if self.anchor is not None else None,
            previous=self.previous.velocity if self.previous is not None else None,
            kl_weight=kl_weight(self.config.objective.kl, self.controller),
        )

    def _check_ratio(self, deviation: float) -> None:
        tolerance = self.config.objective.ratio_tolerance
        if not deviation <= tolerance:
            raise TrainingError(
                f"on the first update the importance ratio is off 1 by {deviation:.3g}, more than "
                f"objective.ratio_tolerance ({tolerance:.3g}): rollout and learner disagree on the policy's output. "
                "Check model.dtype, the attention backends of both machines, and the weights' version"
            )

    def _after_update(self, sums: dict[str, float]) -> None:
        kl = self.config.objective.kl
        if kl is None:
            return
        if self.controller is not None:
            totals = reduced(self.device, sums, "sum")
            observed = totals["kl_anchor"] if kl.anchor != "none" else totals["kl_previous"]
            self.controller.observe(observed / totals["rows"])
        if kl.anchor == "moving" and self.anchor is not None and self.updates_done % kl.refresh_every == 0:
            self.anchor.refresh(self.policy)

    def _table_of(self, position: int, group: TrainingGroup) -> StepTable:
        table = self.family.step_table(self.config.sampler, group.info.task.iteration)
        if group.info.fingerprint != table.fingerprint():
            raise TrainingError(
                f"group {position} was drawn by another sampler than the learner scores with "
                f"({group.info.fingerprint} against {table.fingerprint()}); rollout and learner must share one recipe"
            )
        return table

    def _replay(
        self,
        plan: Sequence[Sequence[Sequence[MicroBatch]]],
        cut: Callable[[MicroBatch], Transitions],
        tables: Mapping[int, StepTable],
    ) -> dict[tuple[int, int], Tensor]:
        """Log-probabilities of this rank's micro-batches before the first update, by update and position."""
        return {
            (index, position): replayed_log_probs(tables[batch.group], self.velocity, cut(batch))
            for index, shares in enumerate(plan)
            for position, batch in enumerate(shares[self.rank])
        }

"""One rank of the learner group: the policy under ZeRO-3, its frozen references, and the updates of an iteration.

It knows neither Ray nor the mailbox; train_loop.py fetches orders and calls it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.config.base import chosen
from euphonium.dynamics import StepTable
from euphonium.errors import TrainingError
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.registry import open_generator
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.engine.collectives import reduced
from learners.engine.partitioned import ZeroPolicy
from learners.policy.batching import MicroBatch, Plan, load_rows, plan_updates
from learners.policy.objective import (
    OldLogProbs,
    References,
    Transitions,
    evaluate_objective,
    old_log_probs,
    replayed_log_probs,
)
from learners.policy.publication import Publisher
from learners.policy.references import AdapterReference, FrozenCopy, Reference
from learners.policy.schedules import kl_controller, kl_weight, learning_rate
from learners.policy.start import start_weights
from learners.policy.statistics import UpdateStatistics

log = logging.getLogger(__name__)


class Learner:
    """One rank of the learner group, without Ray.

    Attributes:
        policy: the transformer under ZeRO-3.
        anchor: frozen reference of the KL penalty, or None.
        previous: copy of the policy that drew the groups, if its means are needed, or None.
        controller: controller of the KL penalty's weight, or None.
        updates_done: number of optimiser steps so far.
        version: policy version, which is the number of iterations trained.
        progressed: called after every micro-batch.
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
        start = None if config.start_from is None else start_weights(config.start_from, self.family)
        self.policy = ZeroPolicy(self.family, pool, config.optimizer, config.model.lora, adapters, start)
        self.anchor: Reference | None = None
        if kl is not None and kl.anchor != "none":
            self.anchor = self._reference("anchor" if kl.anchor == "moving" else None)
        self.previous = self._reference("previous") if objective.needs_previous_policy else None
        self.controller = kl_controller(kl)
        self.publisher = Publisher(config, rank, device, self.policy)
        self.updates_done = 0
        self.version = 0
        self.progressed: Callable[[], None] = lambda: None

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
            TrainingError: a group was drawn by another sampler, or rollout and learner disagree on the probabilities of
                on-policy groups; the weights are then those of before.
        """
        tables = {position: self._table_of(position, groups[position]) for position in payloads}
        plan = self._plan(groups)
        if self.previous is not None:
            self.previous.refresh(self.policy)
        cut = partial(self._rows, groups, payloads)
        replayed = self._replay(plan, groups, cut, tables)
        deviations: dict[str, float] = {}
        statistics = UpdateStatistics(self.world_size)
        for index, shares in enumerate(plan):
            statistics.begin_update()
            self.policy.set_learning_rate(learning_rate(self.config, self.updates_done))
            references = self._references()
            own = shares[self.rank]
            for position, batch in enumerate(own):
                rows = cut(batch)
                source = self._old_log_probs(index, groups[batch.group])
                if source == "own":
                    rows = dataclasses.replace(rows, own_old=True)
                elif source == "replay":
                    rows = dataclasses.replace(rows, log_probs=replayed[index, position])
                value = evaluate_objective(self.config.objective, tables[batch.group], self.velocity, rows, references)
                if batch.weight > 0:
                    # Both must agree only on the first update, and only on groups that the present policy drew.
                    statistics.add(value, on_policy=index == 0 and self._on_policy(groups[batch.group]))
                last = position == len(own) - 1
                if last and index == 0:
                    # The last backward pass moves the weights.
                    deviations = self._agreement(statistics.deviations())
                self.policy.backward(value.loss, last=last)
                self.progressed()
            self.updates_done += 1
            statistics.norms.append(self.policy.grad_norm())
            self._after_update(statistics.of_this_update())
        metrics = statistics.reduced(self.device) | deviations
        metrics |= {
            "policy/learning_rate": learning_rate(self.config, self.updates_done - 1),
            "policy/updates": float(self.updates_done),
        }
        if self.config.objective.kl is not None:
            return metrics | {"kl/weight": references.kl_weight}
        return {name: number for name, number in metrics.items() if not name.startswith("kl/")}

    def _plan(self, groups: Sequence[TrainingGroup]) -> Plan:
        return plan_updates(
            [(group.rows, group.states) for group in groups],
            self.config.objective.updates_per_iteration,
            chosen(self.config.pools.learner.rows_per_micro_batch, "pools.learner.rows_per_micro_batch"),
            self.world_size,
        )

    def _rows(
        self, groups: Sequence[TrainingGroup], payloads: Mapping[int, GroupPayload], batch: MicroBatch
    ) -> Transitions:
        guided_mean = self.config.objective.kind == "standard"
        return load_rows(batch, groups[batch.group], payloads[batch.group], self.device, guided_mean=guided_mean)

    def _references(self) -> References:
        return References(
            anchor=self.anchor.velocity if self.anchor is not None else None,
            previous=self.previous.velocity if self.previous is not None else None,
            kl_weight=kl_weight(self.config.objective.kl, self.controller),
        )

    def _on_policy(self, group: TrainingGroup) -> bool:
        return group.info.policy_version == self.version

    def _old_log_probs(self, update: int, group: TrainingGroup) -> OldLogProbs:
        return old_log_probs(self.config, update, on_policy=self._on_policy(group))

    def _agreement(self, deviations: dict[str, float]) -> dict[str, float]:
        """Checks that rollout and learner agree on the policy's output; returns the metrics of it."""
        objective = self.config.objective
        advice = "check model.dtype, the attention backends of both machines, and the weights' version"
        limits = {
            "policy/ratio_deviation": ("mean", "ratio_tolerance", objective.ratio_tolerance),
            "policy/ratio_deviation_p99": ("99th percentile", "ratio_tolerance_p99", objective.ratio_tolerance_p99),
        }
        for metric, (what, field, limit) in limits.items():
            if not deviations[metric] <= limit:
                raise TrainingError(
                    f"before the first update the {what} of |ratio - 1| is {deviations[metric]:.3g}, more than "
                    f"objective.{field} ({limit:.3g}): rollout and learner disagree on the policy's output. The "
                    f"weights have not been changed; {advice}"
                )
        alarm = deviations["policy/ratio_deviation"] > objective.ratio_alarm
        if alarm and self.rank == 0:
            log.warning(
                "rollout and learner disagree: |ratio - 1| is %.3g on average, above objective.ratio_alarm (%.3g); %s",
                deviations["policy/ratio_deviation"], objective.ratio_alarm, advice,
            )  # fmt: skip
        return deviations | {"policy/ratio_alarm": float(alarm)}

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
        plan: Plan,
        groups: Sequence[TrainingGroup],
        cut: Callable[[MicroBatch], Transitions],
        tables: Mapping[int, StepTable],
    ) -> dict[tuple[int, int], Tensor]:
        """Log-probabilities of this rank's micro-batches before the first update, by update and position.

        Where any rank needs them for its micro-batch, all ranks make the pass, because all take part in each.
        """
        found: dict[tuple[int, int], Tensor] = {}
        for index, shares in enumerate(plan):
            for position, batch in enumerate(shares[self.rank]):
                if any(self._old_log_probs(index, groups[share[position].group]) == "replay" for share in shares):
                    found[index, position] = replayed_log_probs(tables[batch.group], self.velocity, cut(batch))
                    self.progressed()
        return found

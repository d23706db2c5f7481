"""One rank of the learner group: the policy under ZeRO-3, its frozen references, and the updates of an iteration.

It knows neither Ray nor the mailbox; train_loop.py fetches orders and calls it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.config.base import chosen
from euphonium.dynamics import StepTable
from euphonium.errors import TrainingError
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.registry import open_generator
from euphonium.wire.records import GroupPayload, TrainingGroup
from euphonium.wire.tracing import Tracer
from learners.engine.collectives import gathered, reduced
from learners.engine.partitioned import ZeroPolicy
from learners.engine.sequence import replicas
from learners.policy.batching import MicroBatch, Plan, Shares, load_rows, plan_beginning, plan_updates
from learners.policy.begun import Begun, ordinals
from learners.policy.objective import (
    ObjectiveValue,
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
from learners.policy.statistics import UpdateStatistics, reported

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What the micro-batches of an order are made of.

    Attributes:
        groups: groups of the iteration.
        payloads: transitions of the groups that this rank needs, by position.
        tables: their samplers.
        references: frozen policies that the objective compares with.
    """

    groups: Sequence[TrainingGroup]
    payloads: Mapping[int, GroupPayload]
    tables: Mapping[int, StepTable]
    references: References


class Learner:
    """One rank of the learner group, without Ray.

    Attributes:
        policy: the transformer under ZeRO-3.
        anchor: frozen reference of the KL penalty, or None.
        previous: copy of the policy that drew the groups, if its means are needed, or None.
        controller: controller of the KL penalty's weight, or None.
        updates_done: number of optimiser steps so far.
        version: policy version, which is the number of iterations trained.
        replicas: into how many parts the work is cut: as many as ranks, where no ranks share the tokens of samples.
        replica: which of them this rank computes.
        progressed: called after every micro-batch.
        tracer: traces micro-batches.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: torch.device) -> None:
        self.config = config
        self.rank = rank
        self.device = device
        sharing = config.pools.learner.sequence_parallel
        self.replicas, self.replica = replicas(world_size, sharing), rank // sharing
        # Every row is counted by one of the ranks that compute it.
        self._counts = rank % sharing == 0
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
        self.tracer = Tracer(config, f"learner-{rank}")
        self._begun: Begun | None = None

    def _reference(self, adapter: str | None) -> Reference:
        if self.config.model.lora is not None:
            return AdapterReference(self.family, self.policy, adapter)
        return FrozenCopy(self.family, self.config.pools.learner, self.policy)

    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of the policy in training, with gradients."""
        return self.family.velocity(self.policy.model, x, time, conditioning)

    def groups_needed(self, groups: Sequence[TrainingGroup]) -> set[int]:
        """Positions of the groups from which this rank still has to train a row in an update."""
        plan = self._plan(groups)
        done = self._done(groups, plan)
        first, *others = (shares[self.replica] for shares in plan)
        return {batch.group for share in (first[done:], *others) for batch in share}

    def groups_to_begin(self, groups: Sequence[TrainingGroup], expected: int) -> set[int]:
        """Positions of the groups that :meth:`begin` needs on this rank; its arguments are as there."""
        shares = self._beginning(groups, expected)
        return {batch.group for batch in shares[self.replica][self._done(groups, [shares]) :]}

    def begin(self, groups: Sequence[TrainingGroup], expected: int, payloads: Mapping[int, GroupPayload]) -> None:
        """Adds up gradients of an iteration's first update while its last groups are still to come; all ranks must
        call it. What it leaves to do, :meth:`update` does.

        Args:
            groups: the groups that are there, which are the first of the iteration.
            expected: number of groups that the iteration will have.
            payloads: transitions of the groups that this rank needs (:meth:`groups_to_begin`), by position.

        Raises:
            TrainingError: a group was drawn by another sampler.
        """
        shares = self._beginning(groups, expected)
        begun = self._begun_with(groups, [shares])
        work = self._work(groups, payloads, self._references(0))
        for batch in shares[self.replica][begun.done :]:
            with self.tracer.unit():
                value = self._evaluated(work, batch, 0, None, begun.statistics)
                self.policy.backward(value.loss, last=False)
            self.progressed()
        begun.groups, begun.shares = ordinals(groups), shares

    def update(self, groups: Sequence[TrainingGroup], payloads: Mapping[int, GroupPayload]) -> dict[str, float]:
        """Makes all updates of an iteration, or what :meth:`begin` has left of them; all ranks must call it.

        Args:
            groups: the iteration's groups.
            payloads: transitions of the groups that this rank needs (:meth:`groups_needed`), by position.

        Returns:
            Metrics, reduced over all ranks.

        Raises:
            TrainingError: a group was drawn by another sampler, or rollout and learner disagree on the probabilities of
                on-policy groups; the weights are then those of before.
        """
        plan = self._plan(groups)
        begun = self._begun_with(groups, plan)
        statistics, done = begun.statistics, begun.done
        work = self._work(groups, payloads, self._references(0))
        replayed = self._replay(plan, work)
        deviations: dict[str, float] = {}
        for index, shares in enumerate(plan):
            if index > 0:
                statistics.begin_update()
                work = dataclasses.replace(work, references=self._references(index))
            self.policy.set_learning_rate(learning_rate(self.config, self.updates_done))
            own = shares[self.replica]
            for position in range(done if index == 0 else 0, len(own)):
                last = position == len(own) - 1
                with self.tracer.unit():
                    value = self._evaluated(work, own[position], index, replayed.get((index, position)), statistics)
                    if last and index == 0 and not self.config.objective.noises_samples:
                        # The last backward pass moves the weights.
                        deviations = self._agreement(statistics.deviations())
                    self.policy.backward(value.loss, last=last)
                self.progressed()
            self._begun = None
            self.updates_done += 1
            statistics.norms.append(self.policy.grad_norm())
            self._after_update(statistics.of_this_update())
        metrics = statistics.reduced(self.device) | deviations
        metrics |= {
            "policy/learning_rate": learning_rate(self.config, self.updates_done - 1),
            "policy/updates": float(self.updates_done),
            "kl/weight": work.references.kl_weight,
        }
        return reported(metrics, self.config.objective)

    def _done(self, groups: Sequence[TrainingGroup], plan: Plan) -> int:
        """Number of this rank's micro-batches of the first update that have been computed already."""
        return self._begun.done if self._begun is not None and self._begun.begins(groups, plan[0]) else 0

    def _begun_with(self, groups: Sequence[TrainingGroup], plan: Plan) -> Begun:
        """What has been computed of an iteration's first update; begins anew if it is of others than it was."""
        if self._begun is None or not self._begun.begins(groups, plan[0]):
            if self._begun is not None:
                log.info("beginning the update anew: a group that was counted on has been lost")
                self.policy.discard_gradients()
            elif self.previous is not None:
                self.previous.refresh(self.policy)
            self._begun = Begun(
                UpdateStatistics(
                    self.replicas, self.config.sampler.num_steps, self.config.pools.learner.sequence_parallel
                ),
                (),
                [[] for _ in range(self.replicas)],
            )
        return self._begun

    def _evaluated(
        self, work: Work, batch: MicroBatch, index: int, replayed: Tensor | None, statistics: UpdateStatistics
    ) -> ObjectiveValue:
        """The objective of a micro-batch of an update, which the statistics then count."""
        rows = self._rows(work, batch)
        source = self._old_log_probs(index, work.groups[batch.group])
        if source == "own":
            rows = dataclasses.replace(rows, own_old=True)
        elif source == "replay":
            assert replayed is not None
            rows = dataclasses.replace(rows, log_probs=replayed)
        value = evaluate_objective(
            self.config.objective, work.tables[batch.group], self.velocity, rows, work.references,
            statistics.gradients if self._counts else None,
        )  # fmt: skip
        if batch.weight > 0 and self._counts:
            # Both must agree only on the first update, and only on groups that the present policy drew.
            statistics.add(value, on_policy=index == 0 and self._on_policy(work.groups[batch.group]))
        return value

    def alignment(self, groups: Sequence[TrainingGroup], payloads: Mapping[int, GroupPayload]) -> dict[str, float]:
        """Compares the present policy's probabilities with those that groups came with; all ranks must call it.

        Args:
            groups: groups that the present policy drew.
            payloads: as for :meth:`update`.

        Returns:
            ``|ratio - 1|`` over all rows of all ranks: ``mean``, ``p99``, ``max``, and each step's mean, ``step K``.

        Raises:
            TrainingError: a group was drawn by another sampler.
        """
        work = self._work(groups, payloads, self._references(0))
        deviations: list[float] = []
        steps: list[float] = []
        for shares in self._plan(groups):
            for batch in shares[self.replica]:
                rows = self._rows(work, batch)
                log_probs = replayed_log_probs(work.tables[batch.group], self.velocity, rows)
                if batch.weight > 0 and self._counts:
                    deviations += torch.expm1(log_probs - rows.log_probs).abs().tolist()
                    steps += rows.steps.tolist()
        found, at = np.array(gathered(deviations)), np.array(gathered(steps))
        by_step = {f"step {k:.0f}": float(found[at == k].mean()) for k in np.unique(at)}
        return {
            "mean": float(found.mean()), "p99": float(np.quantile(found, 0.99)), "max": float(found.max()), **by_step,
        }  # fmt: skip

    def _plan(self, groups: Sequence[TrainingGroup]) -> Plan:
        return plan_updates(
            [(group.rows, group.states) for group in groups], self.config.objective.updates_per_iteration,
            self._states_per_micro_batch, self.replicas,
        )  # fmt: skip

    def _beginning(self, groups: Sequence[TrainingGroup], expected: int) -> Shares:
        return plan_beginning(
            [(group.rows, group.states) for group in groups], expected, self.config.objective.updates_per_iteration,
            self._states_per_micro_batch, self.replicas,
        )  # fmt: skip

    @property
    def _states_per_micro_batch(self) -> int:
        return chosen(self.config.pools.learner.rows_per_micro_batch, "pools.learner.rows_per_micro_batch")

    def _work(
        self, groups: Sequence[TrainingGroup], payloads: Mapping[int, GroupPayload], references: References
    ) -> Work:
        tables = {position: self._table_of(position, groups[position]) for position in payloads}
        return Work(groups, payloads, tables, references)

    def _rows(self, work: Work, batch: MicroBatch) -> Transitions:
        guided_mean = self.config.objective.kind == "standard"
        group, payload = work.groups[batch.group], work.payloads[batch.group]
        return load_rows(batch, group, payload, self.device, guided_mean=guided_mean)

    def _references(self, update: int) -> References:
        return References(
            anchor=self.anchor.velocity if self.anchor is not None else None,
            # Before the first update it is the policy itself.
            previous=self.previous.velocity if self.previous is not None and update > 0 else None,
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

    def _replay(self, plan: Plan, work: Work) -> dict[tuple[int, int], Tensor]:
        """Log-probabilities of this rank's micro-batches before the first update, by update and position.

        Where any rank needs them for its micro-batch, all ranks make the pass, because all take part in each.
        """
        found: dict[tuple[int, int], Tensor] = {}
        for index, shares in enumerate(plan):
            for position, batch in enumerate(shares[self.replica]):
                if any(self._old_log_probs(index, work.groups[share[position].group]) == "replay" for share in shares):
                    table = work.tables[batch.group]
                    found[index, position] = replayed_log_probs(table, self.velocity, self._rows(work, batch))
                    self.progressed()
        return found

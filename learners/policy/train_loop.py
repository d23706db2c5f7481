"""What every rank of the learner group runs: lease a plan, update, checkpoint, publish, report, again.

Nobody can call into a Ray Train worker, so the group pulls: each rank leases the next plan from the trajectory
buffer, and rank 0 reports what was done. All ranks take the same decisions from the same plan; a rank that cannot
go on says why to the buffer before it raises, so that the orchestrator ends with that message.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import EuphoniumError, LostActorError, TrainingError
from euphonium.generators.generator import Conditioning, open_generator
from euphonium.wire.deadlines import get
from euphonium.wire.records import UpdatePlan, UpdateReport
from learners.engine.partitioned import ZeroPolicy
from learners.engine.zero3 import join_group
from learners.policy.batching import MicroBatch, TrainedGroup, load_rows, plan_updates
from learners.policy.checkpoint import load_rank_state, save_rank_state
from learners.policy.objective import References, evaluate_objective, replayed_log_probs
from learners.policy.publication import Publisher, reduced
from learners.policy.references import AdapterReference, FrozenCopy, Reference
from learners.policy.schedules import kl_controller, kl_weight, learning_rate

log = logging.getLogger(__name__)


class Learner:
    """One rank of the learner group, without Ray.

    Attributes:
        policy: the transformer under ZeRO-3.
        anchor: frozen reference of the KL penalty, or None.
        previous: the policy that drew the groups, where more than log-probabilities is needed of it, or None.
        controller: of the KL's weight, or None.
        updates_done: optimiser steps so far.
        version: policy version that it holds, the number of iterations trained.
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
        """Velocity of the policy in training."""
        return self.family.velocity(self.policy.model, x, time, conditioning)

    def update(self, rows_per_group: Sequence[int], groups: Mapping[int, TrainedGroup]) -> dict[str, float]:
        """Runs all updates of an iteration.

        Args:
            rows_per_group: transitions of every group of the iteration.
            groups: those that this rank needs, by position.

        Returns:
            Metrics over all ranks.

        Raises:
            TrainingError: groups of another sampler, or rollout and learner that disagree on the policy.
        """
        tables = {position: self._table_of(position, group) for position, group in groups.items()}
        pool, objective = self.config.pools.learner, self.config.objective
        plan = plan_updates(rows_per_group, objective.updates_per_iteration, pool.rows_per_micro_batch, self.world_size)
        if self.previous is not None:
            self.previous.refresh(self.policy)
        replayed = self._replay(plan, groups, tables) if objective.old_log_probs == "replay" else {}
        sums = dict.fromkeys(("rows", "loss", "clipped", "ratio", "log_ratio_squared", "kl_anchor", "kl_previous"), 0.0)
        first_deviation, norms, rate, weight = 0.0, [], 0.0, 0.0
        for index, shares in enumerate(plan):
            rate, weight = learning_rate(self.config, self.updates_done), kl_weight(objective.kl, self.controller)
            self.policy.set_learning_rate(rate)
            references = References(
                anchor=self.anchor.velocity if self.anchor is not None else None,
                previous=self.previous.velocity if self.previous is not None else None,
                kl_weight=weight,
            )
            before = dict(sums)
            for position, batch in enumerate(shares[self.rank]):
                rows = load_rows(batch, groups[batch.group], self.device)
                if (index, position) in replayed:
                    rows = dataclasses.replace(rows, log_probs=replayed[index, position])
                value = evaluate_objective(objective, tables[batch.group], self.velocity, rows, references)
                self.policy.backward(value.loss, last=position == len(shares[self.rank]) - 1)
                if batch.weight == 0:
                    continue
                sums["rows"] += len(value.ratio)
                sums["loss"] += value.loss.item() / self.world_size
                sums["clipped"] += value.clipped.sum().item()
                sums["ratio"] += value.ratio.sum().item()
                sums["log_ratio_squared"] += value.ratio.log().square().sum().item()
                sums["kl_anchor"] += value.kl_anchor.sum().item()
                sums["kl_previous"] += value.kl_previous.sum().item()
                # The ratio to an earlier policy is no check of anything.
                if index == 0 and groups[batch.group].on_policy:
                    first_deviation = max(first_deviation, (value.ratio - 1).abs().max().item())
            self.updates_done += 1
            norms.append(self.policy.grad_norm())
            self._after_update({name: sums[name] - before[name] for name in sums})
        totals = reduced(self.device, sums, "sum")
        deviation = reduced(self.device, {"deviation": first_deviation}, "max")["deviation"]
        if not deviation <= objective.ratio_tolerance:
            raise TrainingError(
                f"on the first update the importance ratio is off 1 by {deviation:.3g}, more than "
                f"objective.ratio_tolerance ({objective.ratio_tolerance:.3g}): rollout and learner disagree on the "
                "policy's output. Check model.dtype, the attention backends of both machines, and the weights' version"
            )
        count = totals["rows"]
        metrics = {
            "policy/loss": totals["loss"] / len(plan),
            "policy/ratio_deviation": deviation,
            "policy/ratio_mean": totals["ratio"] / count,
            "policy/clip_fraction": totals["clipped"] / count,
            "policy/approx_kl": 0.5 * totals["log_ratio_squared"] / count,
            "policy/grad_norm": sum(norms) / len(norms),
            "policy/learning_rate": rate,
            "policy/updates": float(self.updates_done),
            "policy/transitions": count,
        }
        if objective.kl is not None:
            metrics["kl/weight"] = weight
            metrics["kl/anchor"] = totals["kl_anchor"] / count
            metrics["kl/previous"] = totals["kl_previous"] / count
        return metrics

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

    def _table_of(self, position: int, group: TrainedGroup) -> StepTable:
        table = self.family.step_table(self.config.sampler, group.iteration)
        if group.fingerprint != table.fingerprint():
            raise TrainingError(
                f"group {position} was drawn by another sampler than the learner scores with "
                f"({group.fingerprint} against {table.fingerprint()}); rollout and learner must share one recipe"
            )
        return table

    def _replay(
        self,
        plan: Sequence[Sequence[Sequence[MicroBatch]]],
        groups: Mapping[int, TrainedGroup],
        tables: Mapping[int, StepTable],
    ) -> dict[tuple[int, int], Tensor]:
        """Log-probabilities of all of this rank's micro-batches before the first update."""
        return {
            (index, position): replayed_log_probs(
                tables[batch.group], self.velocity, load_rows(batch, groups[batch.group], self.device)
            )
            for index, shares in enumerate(plan)
            for position, batch in enumerate(shares[self.rank])
        }


def train_loop(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: ``config`` (the run's configuration as JSON values), ``namespace`` and names of the ``buffer`` and
            ``store`` actors.
    """
    import ray
    import ray.train

    config = RunConfig.model_validate(settings["config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.pools.learner.threads)
    buffer = ray.get_actor(settings["buffer"], namespace=settings["namespace"])
    store = ray.get_actor(settings["store"], namespace=settings["namespace"])
    timeout = config.pools.learner.update_timeout_s
    attempt = ""
    try:
        learner = Learner(config, rank, world_size, join_group())
        attempt = _common_name()
        joined = get(buffer.join.remote(attempt, world_size), timeout, "the buffer's answer to a joining learner")
        resume, learner.version = joined
        if resume is not None:
            load_rank_state(learner, Path(resume))
        # The store may be empty: after a restart rollout actors must draw with exactly these weights.
        learner.publisher.publish(store, learner.version, "policy")
        if rank == 0:
            get(buffer.learner_ready.remote(attempt), timeout, "the buffer's note of the learner's start")
        while _step(learner, buffer, store, attempt, timeout):
            pass
    except LostActorError:
        # Not this group's fault, and curable: Ray Train starts the group anew, which then joins again.
        raise
    except EuphoniumError as error:
        # Not a call that could fail in its turn: the error that counts is the one that is raised.
        ray.wait([buffer.fail.remote(attempt, f"learner rank {rank} of {world_size}: {error}")], timeout=timeout)
        raise


def _common_name() -> str:
    """A name that all ranks of this start of the group share, and no other start."""
    import torch.distributed as dist

    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, src=0)
    return names[0]


def _step(learner: Learner, buffer: Any, store: Any, attempt: str, timeout: float) -> bool:
    """Works off one plan; False when it was the last."""
    rank = learner.rank
    waited = time.perf_counter()
    # Waiting for work has no deadline of its own: the orchestrator ends the run if rollouts stop coming.
    plan, lease = get(buffer.lease.remote(rank, attempt), None, "the next plan")
    assert isinstance(plan, UpdatePlan)
    if plan.iteration != learner.version + (plan.num_groups > 0):
        raise TrainingError(
            f"plan {plan.iteration} does not follow the learner's version {learner.version}: an iteration would be "
            "trained twice or left out"
        )
    began = time.perf_counter()
    metrics: dict[str, float] = {"time/learner_wait_s": began - waited}
    if plan.num_groups:
        refs = [group.pop("payload_ref") for group in lease["groups"].values()]
        payloads = get(refs, timeout, f"the groups of iteration {plan.iteration}")
        groups = {
            position: TrainedGroup(payload=payload, **group)
            for (position, group), payload in zip(lease["groups"].items(), payloads, strict=True)
        }
        fetched = time.perf_counter()
        metrics |= learner.update(lease["rows_per_group"], groups)
        metrics |= {"time/fetch_s": fetched - began, "time/update_s": time.perf_counter() - fetched}
        learner.version = plan.iteration
        began = time.perf_counter()
        metrics |= learner.publisher.publish(
            store, plan.iteration, "policy", keep=plan.stop, receivers=plan.receivers, epoch=plan.epoch
        )
        metrics["time/publish_s"] = time.perf_counter() - began
    elif plan.publish:
        learner.publisher.publish(store, plan.iteration, "policy", keep=plan.stop)
    if plan.publish_average:
        learner.publisher.publish(store, plan.iteration, "average", keep=plan.stop)
    if plan.checkpoint is not None:
        began = time.perf_counter()
        save_rank_state(learner, Path(plan.checkpoint))
        metrics["time/checkpoint_s"] = time.perf_counter() - began
    get(
        buffer.acknowledge.remote(rank, attempt, UpdateReport(iteration=plan.iteration, metrics=metrics)),
        timeout, f"the buffer's receipt for iteration {plan.iteration}",
    )  # fmt: skip
    return not plan.stop

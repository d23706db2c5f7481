"""What every rank of the learner group runs: lease a plan, update, checkpoint, publish, report, again.

Nobody can call into a Ray Train worker, so the group pulls: each rank leases the next plan from the trajectory
buffer, and rank 0 reports what was done. All ranks take the same decisions from the same plan; a rank that cannot
go on says why to the buffer before it raises, so that the orchestrator ends with that message.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import RunConfig
from core.deadlines import get
from core.errors import EuphoniumError, TrainingError
from core.records import Array, GroupPayload, UpdatePlan, UpdateReport
from core.weights import BucketManifest, WeightManifest, pack
from learners.batching import load_rows, plan_updates
from learners.checkpoint import load_rank_state, save_rank_state
from learners.objective import evaluate_objective
from learners.zero3 import ZeroPolicy, quiet_deepspeed
from models.generators.base import Conditioning, open_generator

log = logging.getLogger(__name__)

MEGABYTE = 1 << 20


class Learner:
    """One rank of the learner group, without Ray."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: torch.device) -> None:
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.family = open_generator(config.model)
        self.table = config.sampler.table()
        self.policy = ZeroPolicy(self.family, config.pools.learner, config.optimizer)
        self.updates_done = 0

    def learning_rate(self) -> float:
        """Rate of the next update: linear warm-up, then the schedule over all updates of the run."""
        optimizer = self.config.optimizer
        total = self.config.iterations * self.config.objective.updates_per_iteration
        warmup = optimizer.warmup_updates
        if self.updates_done < warmup:
            return optimizer.learning_rate * (self.updates_done + 1) / warmup
        progress = min(1.0, (self.updates_done - warmup) / max(1, total - warmup))
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[optimizer.schedule]
        return optimizer.learning_rate * factor

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity of the policy in training."""
        return self.family.velocity(self.policy.engine, x, sigma, conditioning)

    def update(
        self,
        rows_per_group: Sequence[int],
        payloads: Mapping[int, GroupPayload],
        advantages: Mapping[int, Array],
        fingerprints: Mapping[int, str],
    ) -> dict[str, float]:
        """Runs all updates of an iteration.

        Args:
            rows_per_group: transitions of every group of the iteration.
            payloads: those groups that this rank needs, by position.
            advantages: of the same groups, ``[group, num_steps]``.
            fingerprints: samplers that drew them.

        Returns:
            Metrics over all ranks.

        Raises:
            TrainingError: groups of another sampler, or rollout and learner that disagree on the policy.
        """
        for group, fingerprint in fingerprints.items():
            if fingerprint != self.table.fingerprint():
                raise TrainingError(
                    f"group {group} was drawn by another sampler than the learner scores with "
                    f"({fingerprint} against {self.table.fingerprint()}); rollout and learner must share one recipe"
                )
        pool, objective = self.config.pools.learner, self.config.objective
        plan = plan_updates(rows_per_group, objective.updates_per_iteration, pool.rows_per_micro_batch, self.world_size)
        sums = dict.fromkeys(("rows", "loss", "clipped", "ratio", "log_ratio_squared"), 0.0)
        first_deviation, norms, rate = 0.0, [], 0.0
        for index, shares in enumerate(plan):
            rate = self.learning_rate()
            self.policy.set_learning_rate(rate)
            for position, batch in enumerate(shares[self.rank]):
                rows = load_rows(batch, payloads[batch.group], advantages[batch.group], self.device)
                value = evaluate_objective(objective, self.table, self.velocity, rows)
                self.policy.backward(value.loss, last=position == len(shares[self.rank]) - 1)
                if batch.weight == 0:
                    continue
                sums["rows"] += len(value.ratio)
                sums["loss"] += value.loss.item() / self.world_size
                sums["clipped"] += value.clipped.sum().item()
                sums["ratio"] += value.ratio.sum().item()
                sums["log_ratio_squared"] += value.ratio.log().square().sum().item()
                if index == 0:
                    first_deviation = max(first_deviation, (value.ratio - 1).abs().max().item())
            self.updates_done += 1
            norms.append(self.policy.grad_norm())
        totals = self._reduce(sums, "sum")
        deviation = self._reduce({"deviation": first_deviation}, "max")["deviation"]
        if not deviation <= objective.ratio_tolerance:
            raise TrainingError(
                f"on the first update the importance ratio is off 1 by {deviation:.3g}, more than "
                f"objective.ratio_tolerance ({objective.ratio_tolerance:.3g}): rollout and learner disagree on the "
                "policy's output. Check model.dtype, the attention backends of both machines, and the weights' version"
            )
        count = totals["rows"]
        return {
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

    def publish(self, store: Any, version: int, kind: str, timeout_s: float) -> float:
        """Collects the weights on rank 0 and hands them to the store, bucket by bucket.

        Returns:
            Bytes published (0 on other ranks).
        """
        pending: list[Any] = []
        manifests: list[BucketManifest] = []
        limit = int(self.config.pools.learner.weight_bucket_mb * MEGABYTE)
        for bucket in self.policy.gathered(limit, average=kind == "average"):
            if self.rank == 0:
                data, manifest = pack(bucket)
                pending.append(store.put_bucket.remote(version, kind, len(manifests), data))
                manifests.append(manifest)
        if self.rank != 0:
            return 0.0
        get(pending, timeout_s, f"the weight store's receipt of version {version}")
        whole = WeightManifest(version=version, kind=kind, buckets=tuple(manifests))
        get(store.commit.remote(whole), timeout_s, f"the weight store's commit of version {version}")
        return float(whole.nbytes)

    def _reduce(self, values: dict[str, float], how: str) -> dict[str, float]:
        import torch.distributed as dist

        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return dict(zip(values, tensor.tolist(), strict=True))


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
    try:
        learner = _start(config, rank, world_size)
        resume = get(buffer.join.remote(rank, world_size), timeout, "the buffer's answer to a joining learner")
        if resume is not None:
            load_rank_state(learner, Path(resume))
        # The store may be empty: after a restart rollout actors must draw with exactly these weights.
        learner.publish(store, get(buffer.version.remote(), timeout, "the policy version"), "policy", timeout)
        if rank == 0:
            get(buffer.learner_ready.remote(world_size), timeout, "the buffer's note of the learner's start")
        while _step(learner, buffer, store, timeout):
            pass
    except EuphoniumError as error:
        ray.get(buffer.fail.remote(f"learner rank {rank} of {world_size}: {error}"))
        raise


def _start(config: RunConfig, rank: int, world_size: int) -> Learner:
    import os

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    quiet_deepspeed()
    import deepspeed

    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return Learner(config, rank, world_size, device)


def _step(learner: Learner, buffer: Any, store: Any, timeout: float) -> bool:
    """Works off one plan; False when it was the last."""
    rank = learner.rank
    waited = time.perf_counter()
    # Waiting for work has no deadline of its own: the orchestrator ends the run if rollouts stop coming.
    import ray

    plan, lease = ray.get(buffer.lease.remote(rank))
    assert isinstance(plan, UpdatePlan)
    began = time.perf_counter()
    metrics: dict[str, float] = {"time/learner_wait_s": began - waited}
    if plan.num_groups:
        payloads = get(list(lease["payloads"].values()), timeout, f"the groups of iteration {plan.iteration}")
        groups = dict(zip(lease["payloads"], payloads, strict=True))
        fetched = time.perf_counter()
        metrics |= learner.update(lease["rows_per_group"], groups, lease["advantages"], lease["fingerprints"])
        metrics |= {"time/fetch_s": fetched - began, "time/update_s": time.perf_counter() - fetched}
        began = time.perf_counter()
        metrics["weights/bytes"] = learner.publish(store, plan.iteration, "policy", timeout)
        metrics["time/publish_s"] = time.perf_counter() - began
    if plan.publish_average:
        learner.publish(store, plan.iteration, "average", timeout)
    if plan.checkpoint is not None:
        began = time.perf_counter()
        save_rank_state(learner, Path(plan.checkpoint))
        metrics["time/checkpoint_s"] = time.perf_counter() - began
    get(
        buffer.acknowledge.remote(rank, UpdateReport(iteration=plan.iteration, metrics=metrics)),
        timeout, f"the buffer's receipt for iteration {plan.iteration}",
    )  # fmt: skip
    return not plan.stop

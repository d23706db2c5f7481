"""The loop of every rank of the learner group: lease an order from the mailbox, carry it out, acknowledge it.

Nobody can call into a Ray Train worker, so the group pulls its orders. All ranks take the same decisions from the same
order. A rank that cannot go on tells the mailbox why before it raises, so that the run ends with that message.

Waits for: the next order, without a deadline of its own, since the run loop ends the run if rollouts stop; the groups
of an update and the mailbox's receipts, each with ``pools.learner.update_timeout_s``. Rank 0 tells the mailbox of every
part of an order that it is through with, without waiting: whoever waits for the order counts from there.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray.actor import ActorProxy

from euphonium.config import RunConfig
from euphonium.errors import EuphoniumError, LostActorError, TrainingError
from euphonium.generators.libraries import import_networks
from euphonium.role_logs import keep_role_log
from euphonium.wire.deadlines import get
from euphonium.wire.devices import release_unused
from euphonium.wire.records import Begin, GroupPayload, Publish, Save, Update, UpdateOrder, UpdateReport
from euphonium.wire.roles import Mailbox, WeightDirectory, named_actor
from euphonium.wire.weights.sender import Publication
from learners.engine.zero3 import join_group
from learners.policy.checkpoint import load_rank_state, save_rank_state
from learners.policy.learner import Learner

log = logging.getLogger(__name__)

# Fewest seconds between two signs of life.
SIGN_EVERY_S = 2.0


def train_loop(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: ``config`` (the run's configuration as JSON values), ``namespace``, and the names of the actors
            ``mailbox`` and ``store``.
    """
    import ray.train

    config = RunConfig.model_validate(settings["config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    keep_role_log(config.run_dir, f"learner-{rank}")
    torch.set_num_threads(config.pools.learner.threads)
    mailbox = named_actor(Mailbox, settings["mailbox"], settings["namespace"])
    store = named_actor(WeightDirectory, settings["store"], settings["namespace"])
    timeout = config.pools.learner.update_timeout_s
    attempt = ""
    try:
        import_networks()
        learner = Learner(config, rank, world_size, join_group(config.pools.learner.num_gpus))
        attempt = _common_name()
        joined = get(mailbox.join.remote(attempt, world_size), timeout, "the mailbox's answer to a joining learner")
        resume, learner.version = joined
        if resume is not None:
            load_rank_state(learner, Path(resume))
        # The store may be empty: after a restart rollout actors must draw with exactly these weights.
        learner.publisher.publish(store, Publication(version=learner.version, kind="policy"))
        if rank == 0:
            get(mailbox.learner_ready.remote(attempt), timeout, "the mailbox's note of the learner's start")
            learner.progressed = signs_of_life(mailbox, attempt)
        stopped = False
        while not stopped:
            waited = time.perf_counter()
            order = get(mailbox.lease.remote(rank, attempt), None, "the next order")
            metrics = {"time/learner_wait_s": time.perf_counter() - waited}
            metrics |= carry_out(order, learner, store, timeout)
            release_unused(config.pools.learner.num_gpus)
            report = UpdateReport(version=order.version, metrics=metrics)
            receipt = mailbox.acknowledge.remote(rank, attempt, report)
            get(receipt, timeout, f"the mailbox's receipt for iteration {order.version}")
            log.info("carried out: %s of version %d", type(order).__name__, order.version)
            stopped = order.stop
    except LostActorError:
        # Not this group's fault, and temporary: Ray Train restarts the group, which then joins again.
        raise
    except EuphoniumError as error:
        # ray.wait does not raise if this call fails: the error that counts is the one that is raised below.
        ray.wait([mailbox.fail.remote(attempt, f"learner rank {rank} of {world_size}: {error}")], timeout=timeout)
        raise


def carry_out(
    order: UpdateOrder, learner: Learner, store: ActorProxy[WeightDirectory], timeout_s: float
) -> dict[str, float]:
    """Carries out an order; every rank of the group does so at the same time.

    Args:
        order: the order.
        learner: this rank.
        store: handle of the weight store.
        timeout_s: longest wait for the groups.

    Returns:
        Metrics, empty for some orders.

    Raises:
        TrainingError: the order's version does not follow the learner's.
    """
    follows = learner.version + isinstance(order, Update)
    if order.version != follows:
        raise TrainingError(
            f"order {order.version} does not follow the learner's version {learner.version}: an iteration would be "
            "trained twice or left out"
        )
    if isinstance(order, Begin):
        return _begin(order, learner, timeout_s)
    if isinstance(order, Update):
        return _update(order, learner, store, timeout_s)
    if isinstance(order, Publish):
        learner.publisher.publish(store, Publication(version=order.version, kind="policy", keep=order.stop))
        if order.average:
            learner.publisher.publish(store, Publication(version=order.version, kind="average", keep=order.stop))
        return {}
    return _save(order, learner)


def _begin(order: Begin, learner: Learner, timeout_s: float) -> dict[str, float]:
    began = time.perf_counter()
    payloads = _fetched(order, learner.groups_to_begin(order.groups, order.expected), timeout_s)
    fetched = time.perf_counter()
    learner.progressed()
    learner.begin(order.groups, order.expected, payloads)
    return {"time/fetch_s": fetched - began, "time/update_s": time.perf_counter() - fetched}


def _fetched(order: Begin | Update, positions: set[int], timeout_s: float) -> dict[int, GroupPayload]:
    """Transitions of some of an order's groups, by position."""
    mine = sorted(positions)
    payloads = get([order.payloads[i] for i in mine], timeout_s, "the groups of an iteration")
    return dict(zip(mine, payloads, strict=True))


def _update(order: Update, learner: Learner, store: ActorProxy[WeightDirectory], timeout_s: float) -> dict[str, float]:
    began = time.perf_counter()
    payloads = _fetched(order, learner.groups_needed(order.groups), timeout_s)
    fetched = time.perf_counter()
    learner.progressed()
    metrics = learner.update(order.groups, payloads)
    updated = time.perf_counter()
    learner.version = order.version
    learner.progressed()
    publication = Publication(
        version=order.version, kind="policy", keep=order.stop, receivers=order.receivers, history=order.history
    )
    metrics |= learner.publisher.publish(store, publication)
    metrics |= {
        "time/fetch_s": fetched - began,
        "time/update_s": updated - fetched,
        "time/publish_s": time.perf_counter() - updated,
    }
    learner.progressed()
    if order.publish_average:
        learner.publisher.publish(store, Publication(version=order.version, kind="average", keep=order.stop))
    if order.checkpoint is not None:
        metrics |= _save(Save(version=order.version, folder=order.checkpoint), learner)
    return metrics


def _save(order: Save, learner: Learner) -> dict[str, float]:
    began = time.perf_counter()
    save_rank_state(learner, Path(order.folder))
    return {"time/checkpoint_s": time.perf_counter() - began}


def signs_of_life(mailbox: ActorProxy[Mailbox], attempt: str) -> Callable[[], None]:
    """A function that tells the mailbox that this group is at work, every few seconds at most; it does not wait."""
    latest = -SIGN_EVERY_S

    def tell() -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest >= SIGN_EVERY_S:
            latest = now
            mailbox.alive.remote(attempt)

    return tell


def _common_name() -> str:
    """A new name for this start of the group, the same on all ranks."""
    import torch.distributed as dist

    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, src=0)
    return names[0]

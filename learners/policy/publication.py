"""Publishes the learner group's weights: all ranks gather them together, and rank 0 hands them to a sender.

How they travel is up to the sender (euphonium/wire/weights/sender.py). Because every rank must take part in gathering,
a failure on rank 0 is first made known to all ranks, then all of them retry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, WeightsMissingError
from euphonium.wire.records import WeightKind
from euphonium.wire.roles import WeightDirectory
from euphonium.wire.weights.sender import (
    BroadcastSender,
    FallbackSender,
    ObjectStoreSender,
    Publication,
    Sent,
    WeightSender,
)
from learners.engine.collectives import reduced
from learners.engine.partitioned import ZeroPolicy

if TYPE_CHECKING:
    from ray.actor import ActorProxy

log = logging.getLogger(__name__)

MEGABYTE = 1 << 20


class Publisher:
    """One rank's part in publications."""

    def __init__(self, config: RunConfig, rank: int, device: torch.device, policy: ZeroPolicy) -> None:
        self._pool = config.pools.learner
        self._rank = rank
        self._device = device
        self._policy = policy
        self._broadcast = BroadcastSender(self._pool.weight_broadcast_timeout_s, device)

    def publish(self, store: ActorProxy[WeightDirectory], publication: Publication) -> dict[str, float]:
        """Publishes the weights; every rank of the group must call this at the same time.

        Args:
            store: handle of the weight store.
            publication: which weights, and to whom.

        Returns:
            Metrics: bytes, and the number of actors that got them by broadcast; both are 0 on other ranks than 0.

        Raises:
            LostActorError: all attempts failed; the weight store does not come back.
        """
        sender: WeightSender = ObjectStoreSender(store, self._pool.update_timeout_s)
        if publication.receivers:
            sender = FallbackSender(self._broadcast, sender)
        for _ in range(sender.attempts):
            sent = self._attempt(sender, publication)
            if sent is not None:
                return {"weights/bytes": float(sent.nbytes), "weights/receivers": float(sent.receivers)}
        raise LostActorError(
            f"the weight store did not take version {publication.version} in {sender.attempts} attempts"
        )

    def _attempt(self, sender: WeightSender, publication: Publication) -> Sent | None:
        """One attempt by all ranks; None if it failed and may be repeated."""
        sent, failure = Sent(), None
        if self._rank == 0:
            try:
                sender.announce(publication)
            except (LostActorError, WeightsMissingError) as error:
                failure = error
        if self._failed_somewhere(failure):
            return None
        buckets = self._buckets(publication.kind)
        if self._rank == 0:
            try:
                sent = sender.send(publication, buckets)
            except (LostActorError, WeightsMissingError) as error:
                failure = error
        # The other ranks, and rank 0 after a failure, gather to the end without sending.
        for _ in buckets:
            pass
        return None if self._failed_somewhere(failure) else sent

    def _buckets(self, kind: WeightKind) -> Iterator[dict[str, Tensor]]:
        limit = int(self._pool.weight_bucket_mb * MEGABYTE)
        return self._policy.gathered(limit, average=kind == "average")

    def _failed_somewhere(self, failure: Exception | None) -> bool:
        if failure is not None:
            log.warning("publishing weights: %s", failure)
        return reduced(self._device, {"failed": float(failure is not None)}, "max")["failed"] > 0

"""How the learner group's weights reach the rollout actors: through the object store, or by a broadcast of its own.

All ranks must collect the weights together, so whatever fails on rank 0 is agreed upon before anything is repeated.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, TrainingError, WeightsMissingError
from euphonium.wire.deadlines import get
from euphonium.wire.records import WeightKind, WeightOrder
from euphonium.wire.roles import RolloutServer, WeightDirectory, named_actor
from euphonium.wire.weights.channel import Channel, host
from euphonium.wire.weights.manifest import BucketManifest, WeightManifest, as_bucket, checksum
from learners.engine.partitioned import ZeroPolicy

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

log = logging.getLogger(__name__)

MEGABYTE = 1 << 20
ATTEMPTS = 5


def reduced(device: torch.device, values: dict[str, float], how: str) -> dict[str, float]:
    """Sums (``how="sum"``) or maxima (``"max"``) of numbers over all ranks."""
    import torch.distributed as dist

    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return dict(zip(values, tensor.tolist(), strict=True))


def hand_in(
    store: ActorProxy[WeightDirectory],
    buckets: Iterable[Mapping[str, Tensor]],
    version: int,
    kind: WeightKind,
    *,
    keep: bool,
    timeout_s: float,
) -> float:
    """Puts weights into the object store, and their references into the weight store.

    Args:
        store: handle of the weight store.
        buckets: tensors on the CPU, by name.
        version: of the policy.
        kind: ``policy`` or ``average``.
        keep: see :meth:`Publisher.publish`.
        timeout_s: longest wait for the store.

    Returns:
        The bytes.

    Raises:
        LostActorError: the store is gone.
        WeightsMissingError: it was restarted meanwhile.
    """
    import ray

    pending: list[ObjectRef[None]] = []
    manifests: list[BucketManifest] = []
    with ThreadPoolExecutor(1, "checksum") as thread:
        for tensors in buckets:
            bucket, entries = as_bucket(tensors)
            check = thread.submit(checksum, bucket)
            boxed = [ray.put(bucket)]
            pending.append(store.put_bucket.remote(version, kind, len(manifests), boxed, keep))
            manifests.append(BucketManifest(entries=entries, checksum=check.result()))
    get(pending, timeout_s, f"the weight store's receipt of version {version}")
    whole = WeightManifest(version=version, kind=kind, buckets=tuple(manifests))
    get(store.commit.remote(whole), timeout_s, f"the weight store's commit of version {version}")
    return float(whole.nbytes)


class Publisher:
    """One rank's part in publishing; see the module."""

    def __init__(self, config: RunConfig, rank: int, device: torch.device, policy: ZeroPolicy) -> None:
        self._pool = config.pools.learner
        self._rank = rank
        self._device = device
        self._policy = policy
        self._broadcaster: Broadcaster | None = None

    def publish(
        self,
        store: ActorProxy[WeightDirectory],
        version: int,
        kind: WeightKind,
        *,
        keep: bool = False,
        receivers: Sequence[str] = (),
        epoch: int = 0,
    ) -> dict[str, float]:
        """Gives out the weights; again, if the weight store dies over it.

        Args:
            store: handle of the weight store.
            version: of the policy.
            kind: ``policy`` or ``average``.
            keep: this learner is about to end, and its weights are still needed.
            receivers: names of rollout actors that take part in a broadcast; without them, or if it fails, the
                weights go through the object store.
            epoch: of the run, for the broadcast.

        Returns:
            Metrics: the bytes, and the number of actors that got them by broadcast.

        Raises:
            LostActorError: the store does not come back.
        """
        if receivers:
            size = self._broadcast(tuple(receivers), version, kind, epoch)
            if size is not None:
                return {"weights/bytes": size, "weights/receivers": float(len(receivers))}
        for attempt in range(ATTEMPTS):
            size, error = 0.0, None
            try:
                size = self._hand_in(store, version, kind, keep)
            except (LostActorError, WeightsMissingError) as lost:
                error = lost
            if not self._failed_somewhere(error is not None):
                return {"weights/bytes": size, "weights/receivers": 0.0}
            log.warning("publishing version %d, attempt %d: %s", version, attempt + 1, error)
            time.sleep(2.0)
        raise LostActorError(f"the weight store did not take version {version} in {ATTEMPTS} attempts")

    def _hand_in(self, store: ActorProxy[WeightDirectory], version: int, kind: WeightKind, keep: bool) -> float:
        buckets = self._buckets(kind)
        if self._rank != 0:
            for _ in buckets:
                pass
            return 0.0
        return hand_in(store, buckets, version, kind, keep=keep, timeout_s=self._pool.update_timeout_s)

    def _broadcast(self, receivers: tuple[str, ...], version: int, kind: WeightKind, epoch: int) -> float | None:
        """Sends the weights to the receivers; None if one of them could not be reached."""
        order = WeightOrder(version=version, kind=kind, epoch=epoch)
        if self._failed_somewhere(self._rank == 0 and not self._prepared(receivers, order)):
            return None
        size, failed, buckets = 0.0, False, self._buckets(kind)
        if self._rank == 0:
            assert self._broadcaster is not None
            try:
                size = self._broadcaster.send(buckets)
            except TrainingError as error:
                # Of whatever kind: an error that only this rank sees would leave the others waiting for it.
                failed = True
                self._give_up(error)
        # Also after a failure: the other ranks collect to the end.
        for _ in buckets:
            pass
        return None if self._failed_somewhere(failed) else size

    def _prepared(self, receivers: tuple[str, ...], order: WeightOrder) -> bool:
        timeout = self._pool.weight_broadcast_timeout_s
        try:
            if self._broadcaster is None or self._broadcaster.receivers != receivers:
                self._broadcaster = Broadcaster(receivers, timeout, self._device)
            self._broadcaster.order(order)
        except LostActorError as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: TrainingError) -> None:
        log.warning("the weights go through the object store this time: %s", error)
        self._broadcaster = None

    def _buckets(self, kind: WeightKind) -> Iterator[dict[str, Tensor]]:
        limit = int(self._pool.weight_bucket_mb * MEGABYTE)
        return self._policy.gathered(limit, average=kind == "average")

    def _failed_somewhere(self, here: bool) -> bool:
        return reduced(self._device, {"failed": float(here)}, "max")["failed"] > 0


class Broadcaster:
    """Rank 0's end of a channel to some rollout actors.

    Attributes:
        receivers: names of the actors.
    """

    def __init__(self, receivers: tuple[str, ...], timeout_s: float, device: torch.device) -> None:
        """Args as described in the class.

        Args:
            receivers: names of the actors.
            timeout_s: longest wait for them, which includes the group that they are drawing.
            device: of this rank.
        """
        import ray.util

        self.receivers = receivers
        self._timeout_s = timeout_s
        self._device = device
        self._store = host(timeout_s)
        self._address = f"{ray.util.get_node_ip_address()}:{self._store.port}"
        self._channel: Channel | None = None
        self._transfer = -1
        self._pending: list[ObjectRef[None]] = []

    def order(self, order: WeightOrder) -> None:
        """Tells the receivers to take part in the next transfer.

        Raises:
            LostActorError: one of them does not come.
        """
        self._transfer += 1
        size = len(self.receivers) + 1
        order = dataclasses.replace(order, address=self._address, transfer=self._transfer, size=size)
        try:
            actors = [named_actor(RolloutServer, name) for name in self.receivers]
        except ValueError as error:
            raise LostActorError(str(error)) from error
        self._pending = [
            actor.receive.remote(dataclasses.replace(order, rank=rank)) for rank, actor in enumerate(actors, start=1)
        ]
        if self._channel is None:
            self._channel = Channel(self._store, 0, size, self._timeout_s, self._device)

    def send(self, buckets: Iterable[Mapping[str, Tensor]]) -> float:
        """Sends, waits until all have taken the weights over, and returns the bytes.

        Raises:
            LostActorError: one of them is gone.
            TrainingError: one of them did not answer in time, or refused the weights.
        """
        assert self._channel is not None
        nbytes = self._channel.send(self._transfer, buckets)
        get(self._pending, self._timeout_s, "the receipt of the weights by the rollout actors")
        return float(nbytes)

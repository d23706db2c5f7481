"""How weights leave the learner group: through the object store, by broadcast, or by broadcast with a fallback.

A sender runs on rank 0 of the learner group and gets the gathered weights bucket by bucket. It neither gathers them nor
retries (learners/policy/publication.py does both, because all ranks must gather together).

Through the object store, rank 0 waits only for the weight store's receipt; rollout actors take the weights when they
are ready. A broadcast waits for its receivers, which first finish the group that they are drawing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from euphonium.errors import LostActorError, TrainingError, WeightsMissingError
from euphonium.wire.deadlines import get
from euphonium.wire.records import WeightKind, WeightOrder
from euphonium.wire.roles import RolloutServer, WeightDirectory, named_actor
from euphonium.wire.weights.channel import Channel, listen
from euphonium.wire.weights.manifest import BucketManifest, WeightManifest, as_bucket, checksum

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy
    from torch._C._distributed_c10d import TCPStore

# Tensors by name, a bucket at a time, where the learner has them; the next may be made while one is under way.
Buckets = Iterable[Mapping[str, Tensor]]

STORE_ATTEMPTS = 5
# A weight store that has died needs a moment to be there again.
STORE_PAUSE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Weights to publish.

    Attributes:
        version: policy version.
        kind: the policy's weights or their moving average.
        keep: whether the weights must outlive this learner group, which is about to end.
        receivers: names of the rollout actors that take part in a broadcast; without any, or if it fails, the weights
            go through the object store.
        history: history of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
    """

    version: int
    kind: WeightKind
    keep: bool = False
    receivers: tuple[str, ...] = ()
    history: int = 0


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The result of a publication.

    Attributes:
        nbytes: bytes of all tensors.
        receivers: number of actors that got the weights by broadcast.
    """

    nbytes: int = 0
    receivers: int = 0


class WeightSender(Protocol):
    """A transport of weights."""

    @property
    def attempts(self) -> int:
        """How often a publication may be tried."""
        ...

    def announce(self, publication: Publication) -> None:
        """Calls the receivers, if they must take part; the weights have not been gathered yet.

        Raises:
            LostActorError: one of them does not join; another attempt may help.
        """
        ...

    def send(self, publication: Publication, buckets: Buckets) -> Sent:
        """Sends the weights that were announced.

        Raises:
            LostActorError: a receiver or the weight store is gone; another attempt may help.
            WeightsMissingError: the weight store was restarted meanwhile; another attempt may help.
        """
        ...


class ObjectStoreSender:
    """Puts weights into the object store, and hands references to the weight store."""

    attempts = STORE_ATTEMPTS

    def __init__(self, store: ActorProxy[WeightDirectory], timeout_s: float) -> None:
        """Creates a sender; nothing is sent.

        Args:
            store: handle of the weight store.
            timeout_s: longest wait for its answers.
        """
        self._store = store
        self._timeout_s = timeout_s

    def announce(self, publication: Publication) -> None:
        """Does nothing: receivers fetch the weights themselves."""

    def send(self, publication: Publication, buckets: Buckets) -> Sent:
        """Puts bucket by bucket, then commits the manifest; pauses before it raises.

        Raises:
            LostActorError: the weight store is gone.
            WeightsMissingError: it was restarted meanwhile.
        """
        try:
            return self._put(publication, buckets)
        except (LostActorError, WeightsMissingError):
            time.sleep(STORE_PAUSE_S)
            raise

    def _put(self, publication: Publication, buckets: Buckets) -> Sent:
        import ray

        version, kind = publication.version, publication.kind
        pending: list[ObjectRef[None]] = []
        manifests: list[BucketManifest] = []
        with ThreadPoolExecutor(1, "checksum") as thread:
            for tensors in buckets:
                bucket, entries = as_bucket({name: tensor.cpu() for name, tensor in tensors.items()})
                check = thread.submit(checksum, bucket)
                boxed = [ray.put(bucket)]
                pending.append(self._store.put_bucket.remote(version, kind, len(manifests), boxed, publication.keep))
                manifests.append(BucketManifest(entries=entries, checksum=check.result()))
        get(pending, self._timeout_s, f"the weight store's receipt of version {version}")
        whole = WeightManifest(version=version, kind=kind, buckets=tuple(manifests))
        get(self._store.commit.remote(whole), self._timeout_s, f"the weight store's commit of version {version}")
        return Sent(nbytes=whole.nbytes)


@dataclass
class _Link:
    """Rank 0's end of a channel to some rollout actors, with the state of its transfers."""

    receivers: tuple[str, ...]
    store: TCPStore
    address: str
    channel: Channel | None = None
    transfer: int = -1
    pending: list[ObjectRef[None]] = field(default_factory=list)


class BroadcastSender:
    """Broadcasts weights to rollout actors, over a channel that stays open while the receivers are the same."""

    attempts = 1

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        """Creates a sender; no channel is opened.

        Args:
            timeout_s: longest wait for the receivers, which includes the group that they are drawing.
            device: device of this rank.
        """
        self._timeout_s = timeout_s
        self._device = device
        self._link: _Link | None = None

    def announce(self, publication: Publication) -> None:
        """Calls the receivers to the next transfer, and opens a channel to them if there is none.

        Raises:
            LostActorError: one of them does not join.
        """
        link = self._link = self._linked(publication.receivers)
        link.transfer += 1
        size = len(link.receivers) + 1
        try:
            actors = [named_actor(RolloutServer, name) for name in link.receivers]
        except ValueError as error:
            raise LostActorError(str(error)) from error
        order = WeightOrder(
            version=publication.version, kind=publication.kind, history=publication.history, address=link.address,
            transfer=link.transfer, size=size,
        )  # fmt: skip
        link.pending = [
            actor.receive.remote(dataclasses.replace(order, rank=rank)) for rank, actor in enumerate(actors, start=1)
        ]
        if link.channel is None:
            link.channel = Channel(link.store, 0, size, self._timeout_s, self._device)

    def send(self, publication: Publication, buckets: Buckets) -> Sent:
        """Broadcasts the weights, and waits until all receivers have loaded them.

        Raises:
            LostActorError: a receiver is gone.
            TrainingError: a receiver did not answer in time, or refused the weights.
        """
        link = self._link
        if link is None or link.channel is None:
            raise ValueError("a broadcast must be announced before it is sent")
        nbytes = link.channel.send(link.transfer, buckets)
        get(link.pending, self._timeout_s, "the receipt of the weights by the rollout actors")
        return Sent(nbytes=nbytes, receivers=len(link.receivers))

    def close(self) -> None:
        """Abandons the channel; the next broadcast opens another one."""
        self._link = None

    def _linked(self, receivers: tuple[str, ...]) -> _Link:
        import ray.util

        if self._link is not None and self._link.receivers == receivers:
            return self._link
        store = listen(self._timeout_s)
        return _Link(receivers, store, f"{ray.util.get_node_ip_address()}:{store.port}")


class FallbackSender:
    """Sends one publication by broadcast and, if that fails, through the object store."""

    def __init__(self, broadcast: BroadcastSender, object_store: WeightSender) -> None:
        self._broadcast = broadcast
        self._object_store = object_store
        self._failed = False

    @property
    def attempts(self) -> int:
        """One broadcast, then the object store's attempts."""
        return self._broadcast.attempts + self._object_store.attempts

    def announce(self, publication: Publication) -> None:
        """Calls the receivers, unless the broadcast has failed before.

        Raises:
            LostActorError: one of them does not join.
        """
        if self._failed:
            self._object_store.announce(publication)
            return
        with self._falling_back():
            self._broadcast.announce(publication)

    def send(self, publication: Publication, buckets: Buckets) -> Sent:
        """Broadcasts the weights; after a failure, sends them through the object store.

        Raises:
            LostActorError: a receiver or the weight store has failed.
            WeightsMissingError: the weight store was restarted meanwhile.
        """
        if self._failed:
            return self._object_store.send(publication, buckets)
        with self._falling_back():
            return self._broadcast.send(publication, buckets)

    @contextmanager
    def _falling_back(self) -> Iterator[None]:
        try:
            yield
        except TrainingError as error:
            # Of whatever kind: an error that only this rank sees would leave the others waiting for it.
            self._failed = True
            self._broadcast.close()
            raise LostActorError(f"the weights go through the object store this time: {error}") from error

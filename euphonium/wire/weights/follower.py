"""How a rollout actor keeps up with the published weights: which ones it holds, and how it gets newer ones.

It knows nothing of models: its owner says where tensors go. Weights are pulled from the store when a task needs newer
ones than are held, or received in a broadcast; never while a group is drawn, since calls to an actor run one after
another.

Waits for: the weight store and the learner's buckets (``pools.start_timeout_s``); the other members of a broadcast
(``pools.learner.weight_broadcast_timeout_s``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from euphonium.config import PoolsConfig
from euphonium.errors import LostActorError, WeightsMissingError
from euphonium.wire.deadlines import get
from euphonium.wire.records import WeightKind, WeightOrder
from euphonium.wire.roles import RolloutContext, WeightDirectory
from euphonium.wire.weights.channel import Channel, connect
from euphonium.wire.weights.manifest import Bucket, WeightManifest, verified

if TYPE_CHECKING:
    from ray.actor import ActorProxy

# Loads the weights of a version, all tensors by name; they are read-only, and each is valid only until the next one is
# requested. After an error what was loaded must not be used.
Load = Callable[[int, Iterable[tuple[str, Tensor]]], None]


class Held(NamedTuple):
    """Which weights an actor holds, in the terms of :class:`euphonium.wire.roles.RolloutContext`."""

    history: int
    version: int
    kind: WeightKind

    def serve(self, context: RolloutContext) -> bool:
        """Whether a task with this context may be drawn with them."""
        return (self.history, self.kind) == (context.history, context.kind) and self.version >= context.version


class WeightFollower:
    """Keeps one actor's weights up to date.

    Attributes:
        holds: the weights that are loaded. None at first, because an actor that Ray has restarted holds none of this
            run's, and after a failed transfer.
    """

    def __init__(
        self, store: ActorProxy[WeightDirectory], load: Load, device: torch.device, pools: PoolsConfig
    ) -> None:
        """Starts without weights.

        Args:
            store: handle of the weight store.
            load: loads tensors into the model.
            device: device that broadcasts arrive on.
            pools: the longest waits.
        """
        self.holds: Held | None = None
        self._store = store
        self._load = load
        self._device = device
        self._pools = pools
        self._channel: tuple[str, Channel] | None = None

    def follow(self, context: RolloutContext) -> float:
        """Loads the newest published weights unless the held ones fit the context; returns the seconds that it took.

        Raises:
            WeightsMissingError: the weight store does not have weights that fit, or it or the weights' owner is gone.
        """
        if self.holds is not None and self.holds.serve(context):
            return 0.0
        began = time.perf_counter()
        manifest, buckets = self._fetch(context.version, context.kind)
        self.holds = None
        self._load(manifest.version, verified(manifest, buckets))
        self.holds = Held(context.history, manifest.version, context.kind)
        return time.perf_counter() - began

    def receive(self, order: WeightOrder) -> None:
        """Receives the weights of a broadcast, and loads them.

        Raises:
            LostActorError: the learner or another member is gone; the weights must be fetched from the store.
        """
        timeout = self._pools.learner.weight_broadcast_timeout_s
        if self._channel is None or self._channel[0] != order.address:
            store = connect(order.address, timeout)
            self._channel = order.address, Channel(store, order.rank, order.size, timeout, self._device)
        self.holds = None
        try:
            self._load(order.version, self._channel[1].receive(order.transfer))
        except LostActorError:
            self._channel = None
            raise
        self.holds = Held(order.history, order.version, order.kind)

    def _fetch(self, version: int, kind: WeightKind) -> tuple[WeightManifest, list[Bucket]]:
        timeout, what = self._pools.start_timeout_s, f"weights of version {version} ({kind})"
        try:
            manifest, refs = get(self._store.fetch.remote(version, kind), timeout, what)
        except LostActorError as error:
            raise WeightsMissingError(f"the weight store is gone: {error}") from error
        try:
            return manifest, get(refs, timeout, what)
        except LostActorError as error:
            self._store.lost.remote(manifest.version, manifest.kind)
            raise WeightsMissingError(f"the learner that published the weights is gone: {error}") from error

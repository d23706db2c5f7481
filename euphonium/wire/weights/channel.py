"""A process group between the learner's rank 0 and the rollout actors, for broadcasts of new weights.

The learner group's own process group cannot take members from outside, and Ray's collectives cannot be used within it.
A channel therefore has a TCP store of its own, on rank 0's node, through which its members meet and manifests travel;
the bytes are broadcast (NCCL between GPUs, gloo between CPUs). A channel lives as long as its members: when they
change, or a broadcast fails, it is abandoned, and the weights go through the object store until there is a new one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import ProcessGroupGloo

from euphonium.errors import LostActorError
from euphonium.wire.weights.manifest import BucketManifest, TensorEntry, pack, unpack, verify

SENDER = 0


class Channel:
    """One member's end of the channel; rank 0 sends, the others receive."""

    def __init__(self, store: TCPStore, rank: int, size: int, timeout_s: float, device: torch.device) -> None:
        """Waits for the other members.

        Args:
            store: the TCP store that :func:`listen` or :func:`connect` returned.
            rank: this member's rank; 0 sends.
            size: number of members, the sender included.
            timeout_s: longest wait for the others, here and in every transfer.
            device: device of the buffers.

        Raises:
            LostActorError: not all members joined in time.
        """
        self._store = store
        self._device = device
        timeout = timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        self._group: Any
        with _lost("the weight channel did not come about"):
            if device.type == "cuda":
                from torch.distributed import ProcessGroupNCCL

                options = ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = ProcessGroupNCCL(PrefixStore("group", store), rank, size, options)
            else:
                self._group = ProcessGroupGloo(PrefixStore("group", store), rank, size, timeout)

    def send(self, transfer: int, buckets: Iterable[Mapping[str, Tensor]]) -> int:
        """Sends buckets of tensors on the CPU to all receivers, and returns the number of bytes.

        Args:
            transfer: number of the transfer, which the receivers must know.
            buckets: tensors by name, a bucket at a time.

        Raises:
            LostActorError: a receiver is gone or does not take part.
        """
        count = nbytes = 0
        for bucket in buckets:
            arrays, manifest = pack(bucket)
            flat = torch.cat([torch.from_numpy(raw) for raw in arrays]).to(self._device)
            with _lost("a receiver of the weights is gone"):
                self._store.set(f"{transfer}/{count}", json.dumps(dataclasses.asdict(manifest)))
                self._group.broadcast(flat, SENDER).wait()
            count += 1
            nbytes += flat.numel()
        with _lost("a receiver of the weights is gone"):
            self._store.set(f"{transfer}/{count}", "null")
        return nbytes

    def receive(self, transfer: int) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of a transfer by name; each must be copied before the next is requested.

        Raises:
            LostActorError: the sender is gone.
            TrainingError: the bytes differ from those that were sent.
        """
        for index in range(2**31):
            with _lost("the sender of the weights is gone"):
                description = json.loads(self._store.get(f"{transfer}/{index}"))
                if description is None:
                    return
                manifest = _manifest(description)
                flat = torch.empty(sum(e.nbytes for e in manifest.entries), dtype=torch.uint8, device=self._device)
                self._group.broadcast(flat, SENDER).wait()
            parts = [part.numpy() for part in flat.cpu().split([entry.nbytes for entry in manifest.entries])]
            verify(manifest, parts)
            yield from unpack(manifest, parts)


def listen(timeout_s: float) -> TCPStore:
    """The TCP store of a new channel, on a free port of this machine; for the sender."""
    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def connect(address: str, timeout_s: float) -> TCPStore:
    """The TCP store at ``host:port``; for receivers.

    Raises:
        LostActorError: the sender cannot be reached.
    """
    name, _, port = address.rpartition(":")
    with _lost(f"the weight channel at {address} cannot be reached"):
        return TCPStore(name, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


@contextmanager
def _lost(what: str) -> Iterator[None]:
    """Turns errors of torch's transports into LostActorError."""
    try:
        yield
    except RuntimeError as error:
        raise LostActorError(f"{what}: {str(error).splitlines()[0]}") from error


def _manifest(description: dict[str, Any]) -> BucketManifest:
    entries = (TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in description["entries"])
    return BucketManifest(entries=tuple(entries), checksum=description["checksum"])

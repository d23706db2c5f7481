"""A process group between the learner's rank 0 and the rollout actors, for broadcasts of new weights.

The learner group's own process group cannot take members from outside, and Ray's collectives cannot be used within it.
A channel therefore has a TCP store of its own, on rank 0's node, through which its members meet and manifests travel;
the bytes are broadcast where they are (NCCL between GPUs, gloo between CPUs). A channel lives as long as its members:
when they change, or a broadcast fails, it is abandoned, and the weights go through the object store until there is a
new one.

Waits for: the other members, in the store, before anybody enters a library that cannot be interrupted; every transfer,
by polling. NCCL's own watchdog, which would end the process, is off: deadlines are this module's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import ProcessGroupGloo

from euphonium.errors import LostActorError, TrainingError
from euphonium.wire.weights.manifest import BucketManifest, TensorEntry, entry_of

SENDER = 0
# Tensors begin at multiples of this in a bucket, so that they can be read in place whatever their type.
ALIGNMENT = 16
POLL_S = 0.001
WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


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
        self._timeout_s = timeout_s
        timeout = timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        with _lost("the weight channel did not come about"):
            # NCCL's first call waits for all members without a deadline: nobody enters it before all are there.
            store.set(f"member/{rank}", "here")
            store.wait([f"member/{other}" for other in range(size)], timeout)
            self._group = _group(PrefixStore("group", store), rank, size, timeout, device)
            self._broadcast(torch.zeros(1, dtype=torch.uint8, device=device))

    def send(self, transfer: int, buckets: Iterable[Mapping[str, Tensor]]) -> int:
        """Sends buckets of tensors to all receivers, and returns the number of bytes.

        Args:
            transfer: number of the transfer, which the receivers must know.
            buckets: tensors by name, a bucket at a time, best on the channel's device.

        Raises:
            LostActorError: a receiver is gone or does not take part.
        """
        count = nbytes = 0
        for bucket in buckets:
            flat, manifest = flattened(bucket, self._device)
            with _lost("a receiver of the weights is gone"):
                self._store.set(f"{transfer}/{count}", json.dumps(dataclasses.asdict(manifest)))
                self._broadcast(flat)
            count += 1
            nbytes += sum(entry.nbytes for entry in manifest.entries)
        with _lost("a receiver of the weights is gone"):
            self._store.set(f"{transfer}/{count}", "null")
        return nbytes

    def receive(self, transfer: int) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of a transfer by name, on the channel's device; they are valid until the next bucket.

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
                flat = torch.empty(_length(manifest.entries), dtype=torch.uint8, device=self._device)
                self._broadcast(flat)
            if digest(flat) != manifest.checksum:
                raise TrainingError("a weight bucket arrived damaged: its checksum differs from the manifest's")
            yield from _views(flat, manifest.entries)

    def _broadcast(self, flat: Tensor) -> None:
        """Broadcasts in place, within the deadline; raises RuntimeError if a member does not take part."""
        work = self._group.broadcast(flat, SENDER)
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                self._abort()
                raise RuntimeError(f"a member did not take part within {self._timeout_s:g} s")
            time.sleep(POLL_S)
        work.wait()
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()

    def _abort(self) -> None:
        """Frees what waits within NCCL for a member that does not come; gloo gives up by itself."""
        if self._device.type == "cuda":
            self._group.abort()


def _group(store: PrefixStore, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    if device.type != "cuda":
        return ProcessGroupGloo(store, rank, size, timeout)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Read when a group is made: of this group alone the watchdog must not end the process.
    before = os.environ.get(WATCHDOG)
    os.environ[WATCHDOG] = "0"
    try:
        return ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[WATCHDOG]
        else:
            os.environ[WATCHDOG] = before


def flattened(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, BucketManifest]:
    """The bytes of some tensors as one uint8 tensor on a device, and their manifest; tensors there stay there.

    >>> flat, manifest = flattened({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}, torch.device("cpu"))
    >>> flat.numel()  # 12 and 4 bytes, each padded
    32
    """
    entries = tuple(entry_of(name, tensor) for name, tensor in tensors.items())
    flat = torch.zeros(_length(entries), dtype=torch.uint8, device=device)
    begin = 0
    for tensor, entry in zip(tensors.values(), entries, strict=True):
        flat[begin : begin + entry.nbytes].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
        begin += _padded(entry.nbytes)
    return flat, BucketManifest(entries=entries, checksum=digest(flat))


def digest(flat: Tensor) -> int:
    """Sum of all bytes in groups of eight, computed where they are."""
    return int(flat.view(torch.int64).sum())


def _views(flat: Tensor, entries: Iterable[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    begin = 0
    for entry in entries:
        part = flat[begin : begin + entry.nbytes]
        yield entry.name, part.view(getattr(torch, entry.dtype)).view(entry.shape)
        begin += _padded(entry.nbytes)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _length(entries: Iterable[TensorEntry]) -> int:
    return sum(_padded(entry.nbytes) for entry in entries)


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

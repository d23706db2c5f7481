"""Weights in transit: buckets of raw bytes, and a manifest of the tensors in them.

Torch tensors travel slowly through Ray's object store (they are pickled and copied), numpy arrays as shared memory.
A bucket is therefore a list of uint8 arrays on the tensors' own memory, so that putting it into the object store is
the only copy; the manifest names the tensors, and a checksum guards each bucket.

Actors that only pass weights on import this without torch, which costs a process a second and 200 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from euphonium.errors import TrainingError
from euphonium.wire.records import WeightKind

if TYPE_CHECKING:
    from torch import Tensor

Bucket = list[NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a bucket; ``dtype`` is torch's name of its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class BucketManifest:
    """Tensors of one bucket, and the checksum of its bytes."""

    entries: tuple[TensorEntry, ...]
    checksum: int


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """One published set of weights.

    Attributes:
        version: policy version, which is the number of the iteration that trained it.
        kind: the policy's weights or their moving average.
        buckets: manifests of the buckets, in order.
    """

    version: int
    kind: WeightKind
    buckets: tuple[BucketManifest, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for bucket in self.buckets for entry in bucket.entries)


def split_into_buckets(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups tensors into buckets of at most ``limit`` bytes, in order; a larger tensor gets a bucket of its own.

    >>> split_into_buckets({"a": 4, "b": 4, "c": 20, "d": 1}, limit=8)
    [['a', 'b'], ['c'], ['d']]

    Args:
        sizes: bytes of each tensor by name.
        limit: bytes of a bucket.
    """
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(name)
        room -= size
    return buckets


def as_bucket(tensors: Mapping[str, Tensor]) -> tuple[Bucket, tuple[TensorEntry, ...]]:
    """A bucket of tensors on the CPU, which shares their memory where they are contiguous, and its entries."""
    import torch

    bucket = [tensor.detach().contiguous().flatten().view(torch.uint8).numpy() for tensor in tensors.values()]
    return bucket, tuple(entry_of(name, tensor) for name, tensor in tensors.items())


def entry_of(name: str, tensor: Tensor) -> TensorEntry:
    """The entry of a tensor in a manifest."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(name=name, dtype=kind, shape=tuple(tensor.shape), nbytes=tensor.nbytes)


def pack(tensors: Mapping[str, Tensor]) -> tuple[Bucket, BucketManifest]:
    """A bucket of tensors on the CPU (:func:`as_bucket`), and its manifest with the checksum.

    >>> import torch
    >>> weights = {"scale": torch.tensor([1.5, 2.5], dtype=torch.bfloat16), "bias": torch.zeros(1, 2)}
    >>> bucket, manifest = pack(weights)
    >>> verify(manifest, bucket)
    >>> dict(unpack(manifest, bucket))
    {'scale': tensor([1.5000, 2.5000], dtype=torch.bfloat16), 'bias': tensor([[0., 0.]])}
    """
    bucket, entries = as_bucket(tensors)
    return bucket, BucketManifest(entries=entries, checksum=checksum(bucket))


def checksum(bucket: Bucket) -> int:
    """Checksum of all bytes; releases the interpreter lock, so that a thread can compute it beside the copying."""
    # As fast as memory: a CRC would cost several times what copying the weights does.
    digest = xxhash.xxh3_64()
    for raw in bucket:
        digest.update(raw.data)
    return digest.intdigest()


def verify(manifest: BucketManifest, bucket: Bucket) -> None:
    """Checks a bucket's bytes against its manifest.

    Raises:
        TrainingError: the bytes differ from those that were published.
    """
    if checksum(bucket) != manifest.checksum:
        raise TrainingError("a weight bucket arrived damaged: its checksum differs from the manifest's")


def unpack(manifest: BucketManifest, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a bucket by name as views, which must not be written to; checksums are not compared."""
    import torch

    from euphonium.wire.arrays import as_tensor

    for entry, raw in zip(manifest.entries, bucket, strict=True):
        yield entry.name, as_tensor(raw).view(getattr(torch, entry.dtype)).view(entry.shape)


def verified(manifest: WeightManifest, buckets: Sequence[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of published weights by name as views, which must not be written to.

    Checksums are computed by a thread meanwhile and compared at the end: after an error the tensors must not be used.

    Raises:
        TrainingError: the bytes differ from those that were published.
    """
    contents = list(zip(manifest.buckets, buckets, strict=True))
    with ThreadPoolExecutor(1, "checksum") as thread:
        checks = [thread.submit(verify, *content) for content in contents]
        for content in contents:
            yield from unpack(*content)
        for check in checks:
            check.result()


def load_tensors(tensors: Iterable[tuple[str, Tensor]], parameters: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names.

    Raises:
        TrainingError: names or shapes differ, or a parameter gets no tensor.
    """
    import torch

    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise TrainingError(
                    f"published weights do not fit the model: {name} {tuple(tensor.shape)} has no counterpart"
                )
            parameters[name].copy_(tensor)
            missing.discard(name)
    if missing:
        raise TrainingError(f"published weights lack {len(missing)} tensors, for example {min(missing)}")

"""Weights on the wire: buckets of raw bytes and a manifest that says what lies where.

Torch tensors travel slowly through Ray's object store (they are pickled and copied), numpy arrays as shared memory.
A bucket is therefore one flat uint8 array; the manifest names the tensors in it, and a checksum guards each bucket.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_tensor
from core.errors import TrainingError

Bucket = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Place of one tensor in a bucket; ``dtype`` is torch's name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class BucketManifest:
    """Contents of one bucket."""

    entries: tuple[TensorEntry, ...]
    checksum: int


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """One published set of weights.

    Attributes:
        version: policy version, the iteration that made it.
        kind: ``policy``, or ``average`` for the moving average.
        buckets: contents of the buckets, in order.
    """

    version: int
    kind: str
    buckets: tuple[BucketManifest, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for bucket in self.buckets for entry in bucket.entries)


def split_into_buckets(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups names into buckets of at most ``limit`` bytes, in order; a larger tensor gets one of its own."""
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(name)
        room -= size
    return buckets


def pack(tensors: Mapping[str, Tensor]) -> tuple[Bucket, BucketManifest]:
    """Copies tensors into one bucket, each at an offset that is a multiple of 16."""
    entries, offset = [], 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        entries.append(
            TensorEntry(
                name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape),
                offset=offset, nbytes=nbytes,
            )
        )  # fmt: skip
        offset += (nbytes + 15) // 16 * 16
    bucket = np.zeros(offset, dtype=np.uint8)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        flat = torch.from_numpy(bucket[entry.offset : entry.offset + entry.nbytes])
        flat.copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
    return bucket, BucketManifest(entries=tuple(entries), checksum=zlib.crc32(bucket.data))


def unpack(manifest: BucketManifest, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a bucket as read-only views.

    Raises:
        TrainingError: the bytes are not those that were published.
    """
    if zlib.crc32(bucket.data) != manifest.checksum:
        raise TrainingError("a weight bucket arrived damaged: its checksum differs from the manifest's")
    for entry in manifest.entries:
        raw = as_tensor(bucket[entry.offset : entry.offset + entry.nbytes])
        yield entry.name, raw.view(getattr(torch, entry.dtype)).view(entry.shape)


def load_buckets(manifest: WeightManifest, buckets: Sequence[Bucket], parameters: Mapping[str, Tensor]) -> None:
    """Copies published weights into a module's tensors.

    Raises:
        TrainingError: names, shapes or bytes do not fit.
    """
    missing = set(parameters)
    with torch.no_grad():
        for description, bucket in zip(manifest.buckets, buckets, strict=True):
            for name, tensor in unpack(description, bucket):
                if name not in parameters or parameters[name].shape != tensor.shape:
                    raise TrainingError(
                        f"published weights do not fit the model: {name} {tuple(tensor.shape)} has no counterpart"
                    )
                parameters[name].copy_(tensor)
                missing.discard(name)
    if missing:
        raise TrainingError(f"published weights lack {len(missing)} tensors, for example {min(missing)}")

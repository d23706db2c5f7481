"""The format of training states: a safetensors file for each rank, with its pieces by kind and name.

A piece is a contiguous range of the flattened parameter. Readers cut the ranges anew, so a training can be resumed
with any number of ranks, also one that a single process began. Nothing in it is a pickle. How a folder of shards
becomes a checkpoint is up to the callers (euphonium/files.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from euphonium.errors import CheckpointError
from learners.engine.engine import MOMENTS, Engine, Kind, whole_shape


def write_shard(engine: Engine, folder: Path, more: Mapping[str, Tensor] | None = None) -> None:
    """Writes this rank's pieces of master weights, moments and moving averages.

    Args:
        engine: the engine to save.
        folder: an existing folder.
        more: further pieces of this rank by key, ``kind/name``.
    """
    pieces = {f"{kind}/{name}": engine.piece(kind, name) for kind, name in _stored(engine, engine.steps)}
    pieces |= more or {}
    target = folder / shard_name(engine.rank, engine.world_size)
    save_file({key: piece.cpu().contiguous() for key, piece in pieces.items()}, target)


def read_shards(engine: Engine, shards: Shards, steps: int) -> None:
    """Restores what :func:`write_shard` wrote on any number of ranks; all ranks must call it.

    Args:
        engine: the engine whose weights, moments and averages are overwritten.
        shards: the open shards.
        steps: number of updates behind the moments; 0 if there are no moments.

    Raises:
        CheckpointError: the shards belong to another model.
    """
    if steps:
        engine.make_moments(steps)
    with torch.no_grad():
        for kind, name in _stored(engine, steps):
            size = engine.piece(kind, name).numel()
            engine.set_piece(
                kind,
                name,
                shards.piece(f"{kind}/{name}", whole_shape(engine.parameters[name]).numel(), size, engine.rank),
            )
    engine.weights_changed()


def shard_name(rank: int, world_size: int) -> str:
    """Name of the file with a rank's pieces."""
    return f"shard_{rank:05d}_of_{world_size:05d}.safetensors"


def _stored(engine: Engine, steps: int) -> Iterator[tuple[Kind, str]]:
    kinds: list[Kind] = ["master"]
    if steps:
        kinds += MOMENTS
    if engine.averages is not None:
        kinds.append("average")
    for kind in kinds:
        for name in engine.parameters:
            yield kind, name


class Shards:
    """The shards of one checkpoint, readable by a group of any size; only the requested ranges are read from disk."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._files = [folder / shard_name(r, world_size) for r in range(world_size)]
        missing = [file.name for file in self._files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}")
        self._stack = ExitStack()
        self._open: list[Any] = []

    def __enter__(self) -> Shards:
        self._open = [self._stack.enter_context(safe_open(file, framework="pt")) for file in self._files]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def piece(self, key: str, numel: int, size: int, rank: int) -> Tensor:
        """Reads one rank's piece of a flattened tensor.

        Args:
            key: the tensor's key in the shards.
            numel: number of elements of the whole tensor; the shards may hold padding beyond it.
            size: number of elements of a piece in the group that reads.
            rank: rank that reads.

        Returns:
            ``[size]``, zeros beyond the end of the tensor.

        Raises:
            CheckpointError: the shards do not have this tensor, or a shorter one.
        """
        try:
            slices = [file.get_slice(key) for file in self._open]
        except Exception as error:
            raise CheckpointError(f"{self._files[0].parent} has no {key}: it is of another model") from error
        written = int(slices[0].get_shape()[0])
        if written * len(slices) < numel:
            raise CheckpointError(f"{self._files[0].parent}: {key} has fewer than {numel} elements: another model")
        begin, end = rank * size, min((rank + 1) * size, numel)
        parts = [
            slices[r][max(begin - r * written, 0) : min(end - r * written, written)]
            for r in range(len(slices))
            if max(begin, r * written) < min(end, (r + 1) * written)
        ]
        found = torch.cat(parts) if parts else torch.empty(0)
        return torch.nn.functional.pad(found, (0, size - found.numel()))

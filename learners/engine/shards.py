"""The one format of training states: each rank's pieces in a safetensors file of its own, by kind and name.

A piece is a contiguous range of the flattened parameter, so that a group of another size only has to cut the ranges
anew: a training goes on with any number of ranks, and a group takes up what one process wrote. Nothing in it is a
pickle. How a folder of shards becomes a checkpoint is the callers' business (euphonium/files.py).
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
    """Writes this rank's masters, moments and averages.

    Args:
        engine: to save.
        folder: exists.
        more: further pieces of this rank by key, ``kind/name``.
    """
    pieces = {f"{kind}/{name}": engine.piece(kind, name) for kind, name in _stored(engine, engine.steps)}
    pieces |= more or {}
    target = folder / shard_name(engine.rank, engine.world_size)
    save_file({key: piece.cpu().contiguous() for key, piece in pieces.items()}, target)


def read_shards(engine: Engine, shards: Shards, steps: int) -> None:
    """Takes over what :func:`write_shard` wrote on any number of ranks; all ranks must call it.

    Args:
        engine: whose weights, moments and averages are overwritten.
        shards: open ones.
        steps: updates that the moments come from; 0 if there were none, and there are no moments.

    Raises:
        CheckpointError: the shards are of another model.
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
    """File of a rank's pieces."""
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
    """The shards of one checkpoint, cut anew for a group of any size; tensors are read only where they are needed."""

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
        """One rank's piece of a flattened tensor.

        Args:
            key: of the tensor in the shards.
            numel: elements of the whole tensor; what the shards hold beyond is padding.
            size: elements of a piece in the group that reads.
            rank: that reads.

        Returns:
            ``[size]``, zeros beyond the end of the tensor.

        Raises:
            CheckpointError: the shards hold no such tensor, or a shorter one.
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

"""Safetensors files by their headers: names and shapes of weights, and whether a file is whole; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

Shapes = dict[str, tuple[int, ...]]

# Names that an error lists of many.
SHOWN = 3


def shapes_of(file: Path) -> Shapes:
    """Shapes of a file's tensors by name.

    Raises:
        ValueError: the file cannot be read, or its length is not what its header says.
    """
    try:
        with safe_open(file, framework="pt") as stream:
            return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file.name} is missing, cut or damaged ({error})") from error


def check_index(index: Path) -> None:
    """Checks that the shards of an index file hold what it says.

    Raises:
        ValueError: the index cannot be read, or a shard or a weight in it is missing.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(shard): {name for name, place in places.items() if place == shard} for shard in places.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index.name} is no index of weights ({error!r})") from error
    for shard, names in sorted(shards.items()):
        if missing := sorted(names - shapes_of(index.parent / shard).keys()):
            raise ValueError(f"{shard} lacks {some(missing)}, which {index.name} puts there")


def check_fit(found: Mapping[str, tuple[int, ...]], network: nn.Module) -> None:
    """Checks that weights have the names and shapes of a network's, which may be on the meta device.

    Raises:
        ValueError: names or shapes differ.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"it lacks {some(missing)}")
    if surplus := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"it has {some(surplus)}, which {type(network).__name__} does not know")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{name} has the shape {list(found[name])} instead of {list(shape)}")


def one_line(error: Exception) -> str:
    """What an error of a library says, which may be pages: its beginning in one line."""
    text = " ".join(str(error).split())[:500] or "no reason given"
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def some(names: list[str]) -> str:
    """A few of many names, and how many there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest

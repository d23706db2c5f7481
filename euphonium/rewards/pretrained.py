"""Weights and optional libraries of reward models: where they come from, and errors when they are missing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from pydantic import PositiveInt
from safetensors.torch import load_file
from torch import Tensor

from euphonium.config import Node
from euphonium.config.base import PathOrHubId
from euphonium.errors import ConfigError
from euphonium.weight_files import check_index, one_line, shapes_of, some

Network = TypeVar("Network", bound=torch.nn.Module)
Dtype = Literal["float32", "bfloat16", "float16"]

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class NetworkOptions(Node):
    """Options of every reward with a network."""

    batch: PositiveInt = 1
    """Videos in one forward pass."""
    device: str | None = None
    """Where the network runs, such as ``cuda:0``; null takes the GPU if there is one."""


class PretrainedOptions(NetworkOptions):
    """Options of rewards with published weights."""

    weights: PathOrHubId
    """Folder with the weights, or a hub id together with ``revision``."""
    revision: str | None = None
    """Commit of the hub id in ``weights``."""
    dtype: Dtype = "bfloat16"
    """Type of the network's weights."""


def library(name: str, reward: str) -> ModuleType:
    """Imports an optional library.

    Raises:
        ConfigError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the reward {reward!r} needs the package {name!r} ({error}); install the extra: pip install '.[rewards]'"
        ) from error


def device_of(name: str | None) -> torch.device:
    """The named device; without a name the GPU, if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(name: Dtype) -> torch.dtype:
    """The torch type that a recipe names."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def pinned(weights: str, revision: str | None, option: str = "weights") -> dict[str, str | bool]:
    """Keyword arguments of ``from_pretrained`` for a folder, or for a hub id with its commit.

    Raises:
        ConfigError: no such folder, or a hub id whose ``revision`` is not a full commit.
    """
    if Path(weights).is_dir():
        return {"pretrained_model_name_or_path": weights, "local_files_only": True}
    if not HUB_ID.fullmatch(weights):
        raise ConfigError(f"option {option}: no folder {weights!r}, and it is no hub id either (owner/name)")
    if revision is None or not COMMIT.fullmatch(revision):
        named = "revision" if option == "weights" else f"{option}_revision"
        raise ConfigError(
            f"option {named}: {weights!r} is a hub id and must be pinned to a commit (40 hexadecimal "
            f"digits), got {revision!r}; a branch or tag can change under a run. For a local copy give its folder"
        )
    return {"pretrained_model_name_or_path": weights, "revision": revision}


@contextmanager
def loading(option: str, weights: str) -> Iterator[None]:
    """Turns errors of ``from_pretrained`` about missing or unfit files into a ConfigError that names the option."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # libraries raise what they happen to stumble over in a damaged file
        raise ConfigError(
            f"option {option}: cannot load {weights!r}: {one_line(error)}; download or copy it again, or give another"
        ) from error


def whole_network(kind: Any, **source: Any) -> Any:
    """A network of transformers by ``kind.from_pretrained(**source)``, all of whose weights are there.

    Raises:
        ValueError: weight files are cut or lack weights, which transformers would make up.
    """
    folder = Path(str(source["pretrained_model_name_or_path"]))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        check_index(index)
    for file in sorted(folder.glob("*.safetensors")):
        shapes_of(file)
    # Without weights first: a damaged configuration may describe a network that no memory holds.
    source["output_loading_info"] = True
    on_meta = source | {"device_map": "meta", "ignore_mismatched_sizes": True}
    network, report = kind.from_pretrained(**on_meta)
    if other := sorted(str(entry[0]) for entry in report["mismatched_keys"]):
        raise ValueError(f"{some(other)} have another shape than config.json says")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its weight files lack {some(missing)}, which a {type(network).__name__} has")
    return network if source.get("device_map") == "meta" else kind.from_pretrained(**source)[0]


def hub_file(source: str, revision: str | None, option: str) -> Path:
    """A file: a local path, or ``owner/name:path/in/repository`` at a pinned commit of the hub.

    Raises:
        ConfigError: it cannot be found, or a hub file is not pinned.
    """
    if Path(source).is_file():
        return Path(source)
    repository, separator, name = source.partition(":")
    if not separator or not HUB_ID.fullmatch(repository):
        raise ConfigError(f"option {option}: no file {source!r}; for a file of the hub write owner/name:path/in/it")
    pinned(repository, revision, option)
    from huggingface_hub import hf_hub_download

    with loading(option, source):
        return Path(hf_hub_download(repository, name, revision=revision))


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pt``/``.pth`` read by torch's restricted unpickler.

    The restricted unpickler builds tensors and plain containers only, so such a file cannot run code.

    Raises:
        ConfigError: the file cannot be read so, or holds no tensors.
    """
    with loading(option, str(path)):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and others for bad files
            raise ValueError(f"torch.load with weights_only=True failed: {error}") from error
        held = held.get("state_dict", held) if isinstance(held, dict) else held
        if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
            raise ValueError("it holds no plain dictionary of tensors")
    return held


def filled(make: Callable[[], Network], state: dict[str, Tensor], option: str, source: str) -> Network:
    """A network with the weights ``state``, which are first held against one that takes no memory.

    Raises:
        ConfigError: it cannot be made, or names or shapes differ.
    """
    with loading(option, source):
        with torch.device("meta"):
            fill(make(), state, option, source)
        network = make()
        fill(network, state, option, source)
    return network


def fill(network: torch.nn.Module, state: dict[str, Tensor], option: str, source: str) -> None:
    """Loads ``state`` into ``network``; both must have the same names.

    Raises:
        ConfigError: names or shapes differ; shows a few.
    """
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        wanted = set(network.state_dict())
        missing, surplus = sorted(wanted - set(state))[:4], sorted(set(state) - wanted)[:4]
        raise ConfigError(
            f"option {option}: {source!r} does not fit {type(network).__name__}: missing {missing}, surplus {surplus}; "
            f"{' '.join(str(error)[:500].split())}; give the files that belong together"
        ) from error

"""The weights that a policy starts from in place of its pipeline's own: another run's, or those of a LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from euphonium.config import LoraConfig
from euphonium.errors import ConfigError
from euphonium.generators.generator import Generator
from euphonium.generators.lora import ADAPTER, adapter_parameters, add_adapter
from euphonium.weight_files import one_line
from learners.policy.checkpoint import AVERAGE_FILE, POLICY_FILE, weights_file

# The file that diffusers writes and reads, and the entry of its header that holds the adapter's settings.
LORA_FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def start_weights(path: Path, family: Generator) -> dict[str, Tensor]:
    """Weights by the names of the policy's trained parameters.

    Args:
        path: folder of a checkpoint, of which the moving average is taken where there is one; or a LoRA as diffusers
            writes it, file or folder.
        family: the generator.

    Raises:
        ConfigError: there are no such weights, or they do not fit the recipe's adapters.
    """
    try:
        if (path / POLICY_FILE).is_file() or (path / AVERAGE_FILE).is_file():
            return load_file(weights_file(path))
        file = path / LORA_FILE if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"start_from: {path} is neither a checkpoint ({POLICY_FILE}) nor a LoRA ({LORA_FILE}); give one, or "
                "set start_from to null: a run that goes on from its own checkpoint does not need it"
            )
        return _adapter(file, family)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"start_from: {path} cannot be read ({one_line(error)}); copy it again") from error


def check_start(path: Path, family: Generator) -> str:
    """Checks that a policy can start from given weights; builds its network on the meta device.

    Returns:
        What was found, in words.

    Raises:
        ConfigError: as :func:`start_weights`, or weights are lacking, too many, or of another shape.
    """
    found = {name: tensor.shape for name, tensor in start_weights(path, family).items()}
    with torch.device("meta"):
        network = family.build_transformer()
        if family.config.lora is not None:
            add_adapter(network, family.config.lora)
            trained: Mapping[str, Tensor] = adapter_parameters(network)
        else:
            trained = {name: p for name, p in network.named_parameters() if family.trains(name)}
    wanted = {name: parameter.shape for name, parameter in trained.items()}
    if found != wanted:
        others = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"start_from: {path} does not have the weights that this recipe trains: {len(others)} differ, for example "
            f"{others[0]} ({_shown(found.get(others[0]))} instead of {_shown(wanted.get(others[0]))}); set model.lora "
            "and model.trained as they were there, or export that run and give the folder as model.path"
        )
    return f"{len(found)} weights of {path}"


def _adapter(file: Path, family: Generator) -> dict[str, Tensor]:
    lora = family.config.lora
    if lora is None:
        raise ConfigError(
            f"start_from: {file} is a LoRA, and this recipe trains all weights; set model.lora, or add it into the "
            "weights: load it with diffusers, fuse_lora() and save_pretrained(), and give that folder as model.path"
        )
    prefix, values = f"{family.backbone}.", {}
    with safe_open(file, framework="pt") as stream:
        settings = json.loads((stream.metadata() or {}).get(METADATA, "{}"))
        for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
            factor = _FACTOR.fullmatch(name.removeprefix(prefix))
            if factor is None or not name.startswith(prefix):
                raise ConfigError(
                    f"start_from: {file} is not in the form in which diffusers writes the LoRA of a "
                    f"{family.pipeline_class} ({name}); write it anew with load_lora_weights and save_lora_weights"
                )
            values[f"{factor[1]}.lora_{factor[2]}.{ADAPTER}.weight"] = stream.get_tensor(name)
    return _rescaled(values, settings.get(f"{prefix}lora_alpha"), lora, file)


def _rescaled(values: dict[str, Tensor], alpha: float | None, lora: LoraConfig, file: Path) -> dict[str, Tensor]:
    """The same adapter with the recipe's scale, ``alpha / rank``."""
    ranks = {len(tensor) for name, tensor in values.items() if ".lora_A." in name}
    if ranks != {lora.rank}:
        raise ConfigError(
            f"start_from: {file} has the rank {' and '.join(map(str, sorted(ranks)))}, and model.lora.rank is "
            f"{lora.rank}; set it to that"
        )
    # Without settings diffusers takes the scale 1.
    factor = (lora.rank if alpha is None else alpha) / lora.alpha
    return {name: tensor * factor if ".lora_B." in name else tensor for name, tensor in values.items()}


def _shown(shape: torch.Size | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))

"""Exports a checkpoint as a diffusers pipeline, or its low-rank adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from euphonium.config import RunConfig
from euphonium.errors import CheckpointError, ConfigError
from euphonium.generators.components import check_generator
from euphonium.generators.generator import Generator
from euphonium.generators.lora import ADAPTER, add_adapter, load_adapter, merged_state
from euphonium.generators.registry import open_generator
from learners.policy.checkpoint import weights_file

CPU = torch.device("cpu")


def export_checkpoint(checkpoint: Path, config: RunConfig, target: Path, *, policy: bool = False) -> None:
    """Writes a complete diffusers pipeline with the weights of a checkpoint; adapters are merged into the weights.

    Args:
        checkpoint: folder of a checkpoint.
        config: configuration of its run.
        target: new folder.
        policy: export the policy itself even if there is a moving average.

    Raises:
        CheckpointError: the folder holds no weights, or the target exists.
    """
    _refuse_existing(target)
    state = load_file(weights_file(checkpoint, policy=policy))
    family = open_generator(config.model)
    check_generator(family)
    if config.model.lora is not None:
        transformer = family.load_transformer(CPU)
        add_adapter(transformer, config.model.lora)
        state = merged_state(transformer, state)
    family.export(state, target)


def export_adapter(checkpoint: Path, config: RunConfig, target: Path, *, policy: bool = False) -> None:
    """Writes ``pytorch_lora_weights.safetensors``, which ``pipeline.load_lora_weights(target)`` reads.

    Args:
        checkpoint: folder of a checkpoint.
        config: configuration of its run.
        target: new folder.
        policy: as for :func:`export_checkpoint`.

    Raises:
        ConfigError: the run trained all weights, or diffusers knows no adapters of its pipeline.
        CheckpointError: the folder holds no weights, or the target exists.
    """
    if config.model.lora is None:
        raise ConfigError(f"--adapter: run {config.name} trained all weights; export the whole pipeline instead")
    _refuse_existing(target)
    from peft.utils import get_peft_model_state_dict

    family = open_generator(config.model)
    pipeline_class = adapter_pipeline(family)
    check_generator(family)
    transformer = family.load_transformer(CPU)
    add_adapter(transformer, config.model.lora)
    load_adapter(transformer, load_file(weights_file(checkpoint, policy=policy)))
    pipeline_class.save_lora_weights(
        target,
        **{
            f"{family.backbone}_lora_layers": get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
            f"{family.backbone}_lora_adapter_metadata": {**transformer.peft_config[ADAPTER].to_dict()},  # type: ignore[union-attr,index]
        },
    )


def adapter_pipeline(family: Generator) -> Any:
    """The pipeline class of diffusers that writes and reads a family's adapters.

    Raises:
        ConfigError: diffusers' pipeline of this family has no adapters.
    """
    import diffusers

    found = getattr(diffusers, family.pipeline_class)
    if len(family.trained_components()) > 1:
        raise ConfigError(
            "--adapter: an adapter of two transformers cannot be written as one; leave --adapter out: the whole "
            "pipeline is then written, with the adapters added into its weights"
        )
    if not (hasattr(found, "save_lora_weights") and hasattr(found, "load_lora_weights")):
        raise ConfigError(
            f"--adapter: diffusers' {family.pipeline_class} cannot load adapters; leave --adapter out: the whole "
            "pipeline is then written, with the adapter added into its weights"
        )
    return found


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another folder or remove it")

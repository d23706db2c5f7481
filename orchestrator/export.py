"""From a checkpoint to a diffusers folder that anybody can load."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from core.config import RunConfig
from core.errors import CheckpointError
from learners.checkpoint import AVERAGE_FILE, POLICY_FILE
from models.generators.base import open_generator


def export_checkpoint(checkpoint: Path, config: RunConfig, target: Path, *, policy: bool = False) -> None:
    """Writes a complete diffusers pipeline with the weights of a checkpoint.

    Args:
        checkpoint: folder of a checkpoint.
        config: of its run.
        target: new folder.
        policy: export the policy itself even when there is a moving average.

    Raises:
        CheckpointError: the folder holds no weights, or the target exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another folder or remove it")
    average = checkpoint / AVERAGE_FILE
    file = average if average.is_file() and not policy else checkpoint / POLICY_FILE
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} holds no weights ({POLICY_FILE} is missing)")
    open_generator(config.model).export(load_file(file), target)

"""The learner group's part of a checkpoint: shards of the training state, and whole weights, all in safetensors.

Besides master weights, moments and averages (learners/engine/shards.py), every rank writes its pieces of the KL
penalty's anchor; rank 0 writes the training's counters, and the whole weights, which evaluation and export read.

The ranks only fill a folder. The orchestrator makes it a checkpoint (orchestrator/state/checkpoints.py), with a
manifest against which everything is verified before it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from euphonium.dynamics.kl import KlController
from euphonium.errors import CheckpointError
from euphonium.files import writing
from learners.engine.engine import BUCKET, on_cpu, whole_shape
from learners.engine.partitioned import ZeroPolicy
from learners.engine.shards import Shards, read_shards, write_shard
from learners.policy.references import Reference

POLICY_FILE = "policy.safetensors"
AVERAGE_FILE = "average.safetensors"
FOLDER = "learner"
TRAINER_FILE = "trainer.json"


class TrainingState(Protocol):
    """The state that a rank of the learner group saves and restores.

    Attributes:
        policy: weights, moments and averages.
        anchor: frozen reference of the KL penalty, or None.
        controller: controller of the penalty's weight, or None.
        updates_done: number of optimiser steps so far.
        version: policy version, for errors; it is not saved here.
    """

    policy: ZeroPolicy
    anchor: Reference | None
    controller: KlController | None
    updates_done: int
    version: int


def save_rank_state(state: TrainingState, folder: Path) -> None:
    """Writes the state of this rank; all ranks must call it.

    Args:
        state: the state to save.
        folder: an existing folder on storage that all ranks and the orchestrator share.

    Raises:
        CheckpointError: the file system refused, for example because it is full.
    """
    policy, target = state.policy, folder / FOLDER
    with writing(f"the learner's part of the checkpoint of iteration {state.version}", folder):
        target.mkdir(exist_ok=True)
        anchor = state.anchor.state() if state.anchor is not None else {}
        write_shard(policy, target, {f"anchor/{name}": piece for name, piece in anchor.items()})
        if policy.rank == 0:
            (target / TRAINER_FILE).write_text(json.dumps(_trainer(state)) + "\n")
        _write_weights(policy, folder / POLICY_FILE, average=False)
        if policy.averages is not None:
            _write_weights(policy, folder / AVERAGE_FILE, average=True)
        policy.barrier()


def load_rank_state(state: TrainingState, folder: Path) -> None:
    """Restores what :func:`save_rank_state` wrote on any number of ranks; all ranks must call it.

    Raises:
        CheckpointError: shards are missing, or belong to another model.
    """
    policy, source = state.policy, folder / FOLDER
    try:
        trainer = json.loads((source / TRAINER_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} holds no state of a learner group ({error})") from error
    with Shards(source, trainer["world_size"]) as shards, torch.no_grad():
        read_shards(policy, shards, trainer["optimizer_steps"])
        if state.anchor is not None and (pieces := state.anchor.state()):
            state.anchor.restore(
                {
                    name: shards.piece(
                        f"anchor/{name}", whole_shape(policy.parameters[name]).numel(), piece.numel(), policy.rank
                    )
                    for name, piece in pieces.items()
                }
            )
    state.updates_done = int(trainer["updates_done"])
    if state.controller is not None and trainer["kl_controller"] is not None:
        state.controller.restore(trainer["kl_controller"])


def weights_file(folder: Path, *, policy: bool = False) -> Path:
    """File with the weights that evaluation and export use: the moving average where there is one.

    Args:
        folder: the checkpoint's folder.
        policy: take the policy itself even if there is a moving average.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    average = folder / AVERAGE_FILE
    file = average if average.is_file() and not policy else folder / POLICY_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no weights ({POLICY_FILE} is missing)")
    return file


def _trainer(state: TrainingState) -> dict[str, object]:
    return {
        "world_size": state.policy.world_size,
        "updates_done": state.updates_done,
        "optimizer_steps": state.policy.steps,
        "kl_controller": state.controller.state() if state.controller is not None else None,
    }


def _write_weights(policy: ZeroPolicy, file: Path, *, average: bool) -> None:
    whole: dict[str, Tensor] = {}
    for bucket in policy.gathered(BUCKET, average=average):
        whole |= on_cpu(bucket)
    if policy.rank == 0:
        save_file(whole, file, metadata={"format": "pt"})

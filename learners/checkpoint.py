"""The learner's part of a checkpoint: DeepSpeed's shards, the moving average, and full weights in safetensors.

The ranks only fill a folder; the orchestrator makes a checkpoint of it (orchestrator/checkpoints.py), with the
manifest whose hashes are verified before anything in it is loaded: DeepSpeed's files are pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError

if TYPE_CHECKING:
    from learners.train_loop import Learner

POLICY_FILE = "policy.safetensors"
AVERAGE_FILE = "average.safetensors"
TAG = "zero3"


def save_rank_state(learner: Learner, folder: Path) -> None:
    """Writes everything that this rank needs to go on; all ranks must call it.

    Args:
        learner: to save.
        folder: exists, and is on storage that all ranks and the orchestrator share.
    """
    import torch.distributed as dist

    policy = learner.policy
    state = {
        "updates_done": learner.updates_done,
        "kl_controller": learner.controller.state() if learner.controller is not None else None,
    }
    # A frozen base is not part of the training state: it comes from the generator's own files.
    policy.engine.save_checkpoint(
        str(folder),
        tag=TAG,
        client_state=state,
        save_latest=False,
        exclude_frozen_parameters=learner.config.model.lora is not None,
    )
    if learner.anchor is not None and (pieces := learner.anchor.state()):
        save_file(pieces, folder / f"anchor_shard_{learner.rank}.safetensors")
    if policy.averages is not None:
        shards = {str(i): tensor for i, tensor in enumerate(policy.averages)}
        save_file(shards, folder / f"average_shard_{learner.rank}.safetensors")
    for name, average in ((POLICY_FILE, False), (AVERAGE_FILE, True)):
        if average and policy.averages is None:
            continue
        whole: dict[str, torch.Tensor] = {}
        for bucket in policy.gathered(1 << 28, average=average):
            whole |= bucket
        if learner.rank == 0:
            save_file(whole, folder / name, metadata={"format": "pt"})
    dist.barrier()


def weights_file(folder: Path, *, policy: bool = False) -> Path:
    """The weights of a checkpoint that evaluation and export use: the moving average where there is one.

    Args:
        folder: of the checkpoint.
        policy: the policy itself in any case.

    Raises:
        CheckpointError: the folder holds none.
    """
    average = folder / AVERAGE_FILE
    file = average if average.is_file() and not policy else folder / POLICY_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no weights ({POLICY_FILE} is missing)")
    return file


def load_rank_state(learner: Learner, folder: Path) -> None:
    """Restores what :func:`save_rank_state` wrote, into a learner of the same world size.

    Raises:
        CheckpointError: the shards are missing or of another world size.
    """
    policy = learner.policy
    shards = sorted((folder / TAG).glob("*_optim_states.pt"))
    if len(shards) != learner.world_size:
        raise CheckpointError(
            f"{folder} holds the shards of {len(shards)} learner ranks, this run has {learner.world_size}: "
            f"set pools.learner.num_workers={len(shards)}"
        )
    loaded, client_state = policy.engine.load_checkpoint(
        str(folder), tag=TAG, load_module_strict=learner.config.model.lora is None
    )
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load its shards from {folder / TAG}")
    learner.updates_done = int(client_state["updates_done"])
    if learner.controller is not None and client_state["kl_controller"] is not None:
        learner.controller.restore(client_state["kl_controller"])
    anchor = folder / f"anchor_shard_{learner.rank}.safetensors"
    if learner.anchor is not None and anchor.exists():
        learner.anchor.restore(load_file(anchor))
    if policy.averages is not None:
        stored = load_file(folder / f"average_shard_{learner.rank}.safetensors")
        for i, tensor in enumerate(policy.averages):
            tensor.copy_(stored[str(i)])

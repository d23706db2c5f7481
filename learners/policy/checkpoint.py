"""The learner's part of a checkpoint: shards of the training state, and full weights, all in safetensors.

Every rank writes its piece of every parameter's float32 master, of Adam's moments, of the moving average and of the
KL's anchor, flat and by name. A piece is a contiguous range of the flattened parameter, so that a group of another
size only has to cut the ranges anew: a run goes on with any number of ranks. Nothing in it is a pickle.

The ranks only fill a folder; the orchestrator makes a checkpoint of it (orchestrator/checkpoints.py), with the
manifest whose hashes are verified before anything in it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from euphonium.errors import CheckpointError
from euphonium.files import writing
from learners.engine.zero3 import MOMENTS, shard

if TYPE_CHECKING:
    from learners.policy.learner import Learner

POLICY_FILE = "policy.safetensors"
AVERAGE_FILE = "average.safetensors"
FOLDER = "learner"
TRAINER_FILE = "trainer.json"


def save_rank_state(learner: Learner, folder: Path) -> None:
    """Writes everything that this rank needs to go on; all ranks must call it.

    Args:
        learner: to save.
        folder: exists, and is on storage that all ranks and the orchestrator share.

    Raises:
        CheckpointError: the file system refused.
    """
    with writing(f"the learner's part of the checkpoint of iteration {learner.version}", folder):
        _save_rank_state(learner, folder)


def _save_rank_state(learner: Learner, folder: Path) -> None:
    import torch.distributed as dist

    policy, target = learner.policy, folder / FOLDER
    target.mkdir(exist_ok=True)
    name = f"shard_{learner.rank:05d}_of_{learner.world_size:05d}.safetensors"
    save_file({key: piece.cpu().contiguous() for key, piece in _pieces(learner)}, target / name)
    if learner.rank == 0:
        trainer = {
            "world_size": learner.world_size,
            "updates_done": learner.updates_done,
            "optimizer_steps": _optimizer_steps(learner),
            "kl_controller": learner.controller.state() if learner.controller is not None else None,
        }
        (target / TRAINER_FILE).write_text(json.dumps(trainer) + "\n")
    for file, average in ((POLICY_FILE, False), (AVERAGE_FILE, True)):
        if average and policy.averages is None:
            continue
        whole: dict[str, Tensor] = {}
        for bucket in policy.gathered(1 << 28, average=average):
            whole |= bucket
        if learner.rank == 0:
            save_file(whole, folder / file, metadata={"format": "pt"})
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
    """Restores what :func:`save_rank_state` wrote, with any number of ranks; all ranks must call it.

    Raises:
        CheckpointError: shards are missing or of another model.
    """
    policy, source = learner.policy, folder / FOLDER
    try:
        trainer = json.loads((source / TRAINER_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} holds no state of a learner group ({error})") from error
    with Shards(source, trainer["world_size"]) as shards, torch.no_grad():
        for name, parameter in policy.parameters.items():
            numel = int(parameter.ds_numel)

            def piece(kind: str, like: Tensor, name: str = name, numel: int = numel) -> Tensor:
                return shards.piece(f"{kind}/{name}", numel, like.numel(), learner.rank)

            local = shard(parameter)
            master, moments = _master(policy.engine, parameter, trainer["optimizer_steps"])
            master.copy_(piece("master", local))
            local.copy_(master)
            for kind, moment in moments.items():
                moment.copy_(piece(kind, local))
        for i, name in enumerate(policy.parameters if policy.averages is not None else ()):
            assert policy.averages is not None
            average = policy.averages[i]
            numel = int(policy.parameters[name].ds_numel)
            average.copy_(shards.piece(f"average/{name}", numel, average.numel(), learner.rank))
        if learner.anchor is not None and (pieces := learner.anchor.state()):
            numels = {n: int(p.ds_numel) for n, p in policy.parameters.items()}
            learner.anchor.restore(
                {n: shards.piece(f"anchor/{n}", numels[n], t.numel(), learner.rank) for n, t in pieces.items()}
            )
    # Small parameters are held whole on every rank; they must show the new pieces.
    zero = policy.engine.optimizer
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    learner.updates_done = int(trainer["updates_done"])
    if learner.controller is not None and trainer["kl_controller"] is not None:
        learner.controller.restore(trainer["kl_controller"])


class Shards:
    """The shards of one checkpoint, cut anew for a group of any size; tensors are read only where they are needed."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._files = [folder / f"shard_{r:05d}_of_{world_size:05d}.safetensors" for r in range(world_size)]
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


def _pieces(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the training state, by key."""
    policy = learner.policy
    steps = _optimizer_steps(learner)
    for name, parameter in policy.parameters.items():
        master, moments = _master(policy.engine, parameter, steps)
        yield f"master/{name}", master
        for kind, moment in moments.items():
            yield f"{kind}/{name}", moment
    if policy.averages is not None:
        for name, average in zip(policy.parameters, policy.averages, strict=True):
            yield f"average/{name}", average
    if learner.anchor is not None:
        for name, piece in learner.anchor.state().items():
            yield f"anchor/{name}", piece


def _optimizer_steps(learner: Learner) -> int:
    """Steps that Adam has counted, for its bias correction; 0 before the first, when it has no moments yet."""
    states = learner.policy.engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _master(engine: Any, parameter: nn.Parameter, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Views of this rank's float32 master and Adam moments of a parameter; moments only after ``steps`` > 0."""
    zero = engine.optimizer
    group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    state = zero.optimizer.state[flat]
    if steps > 0 and "step" not in state:
        state["step"] = torch.tensor(0.0)
        state |= {kind: torch.zeros_like(flat) for kind in MOMENTS}
    if steps > 0:
        state["step"].fill_(float(steps))
    moments = {kind: state[kind].narrow(0, offset, numel) for kind in MOMENTS if steps > 0}
    return flat.detach().narrow(0, offset, numel), moments

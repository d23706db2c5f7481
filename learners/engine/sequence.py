"""How the ranks of a learner group are divided where several share every sample's tokens.

``W`` ranks make ``W / S`` replicas of ``S`` consecutive ranks, so that a replica's ranks are on one node where a node
has room for them. All ranks of a replica train on the same rows, in the same order. ZeRO-3 shares weights and states
among all ``W``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from euphonium.errors import TrainingError

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig


def replicas(world_size: int, ranks: int) -> int:
    """Number of replicas.

    Args:
        world_size: ranks of the group.
        ranks: ranks of a replica.

    Raises:
        TrainingError: some ranks would be left over.
    """
    if world_size % ranks:
        raise TrainingError(
            f"the learner group has {world_size} ranks, no multiple of pools.learner.sequence_parallel ({ranks})"
        )
    return world_size // ranks


def token_groups(ranks: int) -> ParallelConfig | None:
    """The groups of ranks that share tokens, for :func:`euphonium.generators.sequence.share_tokens`.

    All ranks of the group must call it; torch.distributed must be initialised.

    Args:
        ranks: ranks of a replica; there are no groups of one.
    """
    if ranks == 1:
        return None
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device(get_accelerator().current_device_name())
    mesh = dist.device_mesh.init_device_mesh(
        device.type, (replicas(world_size, ranks), 1, ranks), mesh_dim_names=("replica", "ring", "ulysses")
    )
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ranks, mesh=mesh))
    config.setup(rank, world_size, device, mesh=mesh)
    return config

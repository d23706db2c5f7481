"""The engine of a rank under DeepSpeed ZeRO-3, and how it is set up.

Every rank holds one contiguous piece of every flattened parameter in ``parameter.ds_tensor``; the last rank's may end
in padding. Weights are gathered and overwritten piece by piece, so neither needs a second copy of the model, and
DeepSpeed need not materialise parameters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import OptimizerConfig, RewardOptimizerConfig, TrainingGroupConfig
from euphonium.wire.devices import reserved_device
from learners.engine.engine import Engine, HeldKind, adamw
from learners.engine.options import Options, training_options


def quiet_deepspeed() -> None:
    """Limits DeepSpeed's log to warnings, and keeps it from compiling a shared-memory op that training never calls."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The op serves inference_all_reduce only; compiling it costs a minute on a fresh machine and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def join_group(num_gpus: float) -> torch.device:
    """Makes this process a rank of the group that its environment variables describe.

    Args:
        num_gpus: GPUs that the rank has reserved.

    Returns:
        The device that the rank computes on.
    """
    device = reserved_device(num_gpus)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    quiet_deepspeed()
    import deepspeed

    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


class ZeroEngine(Engine):
    """Trains a model as one rank of a group; torch.distributed must be initialised.

    Args:
        module: the model, partitioned already or whole on every rank; parameters that require gradients are trained.
        settings: settings of the optimiser.
        options: options of DeepSpeed.
        averages: whether to keep moving averages.
    """

    def __init__(
        self, module: nn.Module, settings: OptimizerConfig | RewardOptimizerConfig, options: Options, *, averages: bool
    ) -> None:
        quiet_deepspeed()
        import deepspeed
        import torch.distributed as dist

        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = adamw(trained.values(), settings)
        self._deepspeed: Any
        self._deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options)
        _register_attention(module)
        self._deepspeed.train()
        super().__init__(self._deepspeed, trained, optimizer, self._deepspeed.device, averages=averages)

    @override
    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        self._deepspeed.step()

    def discard_gradients(self) -> None:
        """Drops the gradients that have been added up since the last update."""
        self._deepspeed.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Global gradient norm of the latest update, before clipping."""
        norm = self._deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @override
    def weights_changed(self) -> None:
        drop_second_copies(self._deepspeed.module)
        whole = self._deepspeed.optimizer.persistent_parameters
        if whole:
            # Small parameters that are held whole on every rank.
            whole[0].partition(whole)
            whole[0].all_gather(whole)
        else:
            # DeepSpeed keeps the parameters that the next pass of the same kind needs first; a pass without gradients
            # never releases them.
            self._deepspeed.empty_partition_cache()

    @override
    def _stepped(self) -> Iterable[Tensor]:
        # DeepSpeed offers no way to create moments before the first step.
        flat: list[Tensor] = self._deepspeed.optimizer.fp32_partitioned_groups_flat
        return flat

    @override
    def _held(self, kind: HeldKind, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if kind == "weights":
            return shard(parameter)
        found: Tensor
        if kind == "master":
            found = safe_get_local_fp32_param(parameter)
        else:
            found = safe_get_local_optimizer_state(parameter, kind)
        return found.detach()

    @override
    def _set_held(self, kind: HeldKind, parameter: nn.Parameter, piece: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if kind in ("weights", "master"):
            shard(parameter).copy_(piece)
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, kind)


def reward_engine(model: nn.Module, settings: RewardOptimizerConfig, pool: TrainingGroupConfig) -> ZeroEngine:
    """The engine of a float32 reward model, which is whole on every rank before, with moving averages."""
    # Averages are swapped in piece by piece, which would not reach parameters that are kept whole.
    options = training_options(pool, settings, torch.float32, whole_below=0)
    return ZeroEngine(model, settings, options, averages=True)


def shard(parameter: nn.Parameter) -> Tensor:
    """This rank's flat piece of a partitioned parameter; the last rank's may end in padding."""
    piece: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return piece.detach()


def drop_second_copies(model: nn.Module) -> None:
    """Drops the copies that a node's ranks share with ``zero_hpz_partition_size``; the next pass makes them anew."""
    for parameter in model.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]  # DeepSpeed's


def _register_attention(model: nn.Module) -> None:
    """Makes ZeRO-3 gather the parameters that an attention layer reads from a submodule that it never calls."""
    import deepspeed

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for parameter in module.out_proj.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)

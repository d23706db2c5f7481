"""The policy under DeepSpeed ZeRO-3: built partitioned, trained, read out shard by shard.

Every rank holds one contiguous piece of every (flattened) parameter in ``parameter.ds_tensor``. Loading fills those
pieces from the safetensors files and publication collects them on rank 0, a bucket at a time: neither ever holds a
second copy of the model, and neither needs DeepSpeed to materialise parameters.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from euphonium.config import LearnerPoolConfig, LoraConfig, OptimizerConfig
from euphonium.errors import TrainingError
from euphonium.generators.generator import Generator
from euphonium.generators.lora import ADAPTER, adapter_parameters, add_adapter, initial_adapter
from euphonium.wire.weights.manifest import split_into_buckets

# Adam's states of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def quiet_deepspeed() -> None:
    """Keeps DeepSpeed to warnings, and from compiling a shared-memory op that training never calls."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The op serves inference_all_reduce only; compiling it costs a minute on a fresh machine and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def join_group() -> torch.device:
    """Makes this process a rank of the group that its environment variables name.

    Returns:
        Where the rank computes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    quiet_deepspeed()
    import deepspeed

    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def deepspeed_config(pool: LearnerPoolConfig, optimizer: OptimizerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration; accumulation is driven by hand, so it stays at 1 there."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": pool.persistence_threshold,
        "contiguous_gradients": True,
        # DeepSpeed's own linear replaces torch's for the whole process and computes in another order: the learner
        # must give the very numbers that rollout actors got.
        "memory_efficient_linear": False,
        "overlap_comm": torch.cuda.is_available(),
    }
    if pool.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }


class ZeroPolicy:
    """A transformer under ZeRO-3 with its optimizer.

    Attributes:
        engine: DeepSpeed's engine.
        module: the partitioned transformer.
        parameters: its trained parameters by name, in a fixed order.
        averages: float32 moving averages of this rank's pieces, or None.
    """

    def __init__(
        self,
        family: Generator,
        pool: LearnerPoolConfig,
        optimizer: OptimizerConfig,
        lora: LoraConfig | None = None,
        frozen_adapters: Sequence[str] = (),
    ) -> None:
        """Builds, loads and partitions the transformer.

        Args:
            family: of the generator.
            pool: how it is partitioned.
            optimizer: how it is trained.
            lora: train adapters instead of all weights.
            frozen_adapters: names of further adapters, for references.
        """
        import deepspeed

        settings = deepspeed_config(pool, optimizer, family.dtype)
        if frozen_adapters:
            # References are refreshed piece by piece; a small parameter that is kept whole would not see it.
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        # Init patches torch's constructors while it is open; a library imported under it may break on them.
        family.transformer_class()
        with deepspeed.zero.Init(config_dict_or_path=settings):
            module = family.build_transformer()
            load_partitioned(module, family)
            if lora is not None:
                for name in (ADAPTER, *frozen_adapters):
                    add_adapter(module, lora, name)
        if lora is not None:
            _fill_adapters(module, (ADAPTER, *frozen_adapters))
            module.set_adapter(ADAPTER)  # type: ignore[operator]
            trained = adapter_parameters(module)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in trained)
        if pool.gradient_checkpointing:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        adamw = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        # See gather_by_block: with adapters no input of the first block needs a gradient, and guidance passes every
        # block twice, with the prompt and without.
        if pool.gather_blocks and lora is None and family.config.cfg_scale is None:
            gather_by_block(module)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=settings)
        self.engine.train()
        self.module: nn.Module = self.engine.module
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.ema_decay = optimizer.ema_decay
        self.averages: list[Tensor] | None = None
        if optimizer.averages:
            self.averages = [shard(p).float().clone() for p in self.parameters.values()]

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients of one micro-batch; with ``last``, reduces and updates the weights."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()
        if last and self.averages is not None:
            # One by one: all pieces at once in float32 would be a second copy of what this rank holds.
            for average, parameter in zip(self.averages, self.parameters.values(), strict=True):
                average.lerp_(shard(parameter).float(), 1 - self.ema_decay)

    def grad_norm(self) -> float:
        """Global norm of the latest update's gradients, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def gathered(self, bucket_bytes: int, *, average: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collects full weights on rank 0, bucket by bucket; all ranks must iterate to the end.

        Args:
            bucket_bytes: size of a bucket, by what its tensors take when whole.
            average: collect the moving averages (in the weights' type) instead of the weights.

        Yields:
            On rank 0 the tensors of the bucket by name, on the CPU; elsewhere an empty mapping.
        """
        pieces = {name: shard(p) for name, p in self.parameters.items()}
        if average and self.averages is not None:
            pieces = dict(zip(self.parameters, self.averages, strict=True))
        sizes = {name: p.ds_numel * p.element_size() for name, p in self.parameters.items()}
        for names in split_into_buckets(sizes, bucket_bytes):
            parameters = {name: self.parameters[name] for name in names}
            yield _gather_bucket(parameters, [pieces[name].to(p.dtype) for name, p in parameters.items()])


def gather_by_block(module: nn.Module) -> None:
    """Has ZeRO-3 gather, release and reduce each transformer block as one, not layer by layer.

    DeepSpeed's hooks then run around some tens of blocks instead of hundreds of layers, and its collectives are fewer
    and larger; a rank holds the weights and gradients of a whole block at a time. To be called before
    ``deepspeed.initialize``. DeepSpeed reduces a block's gradients when those of its inputs are there: every block must
    have an input that needs a gradient, and be passed once in a forward pass.
    """
    from deepspeed.utils import set_z3_leaf_modules

    never_split: Sequence[str] = getattr(module, "_no_split_modules", None) or ()
    names = [name for name in never_split if name.endswith("TransformerBlock")]
    for block in set_z3_leaf_modules(module, names, raise_if_not_found=False):
        signature = inspect.signature(block.forward)
        block.register_forward_pre_hook(functools.partial(_positional, signature), with_kwargs=True)


def _positional(
    signature: inspect.Signature, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Passes a block's inputs by position: neither DeepSpeed's hooks nor torch's see those passed by name."""
    bound = signature.bind(*args, **kwargs)
    if torch.is_grad_enabled() and not any(isinstance(a, Tensor) and a.requires_grad for a in bound.args):
        raise TrainingError(
            f"no input of a {type(block).__name__} needs a gradient, so that ZeRO-3 would lose gradients of its "
            "weights; set pools.learner.gather_blocks to false"
        )
    return bound.args, bound.kwargs


def shard(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a partitioned parameter, flat; the last rank's may end in padding."""
    piece: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return piece.detach()


def load_partitioned(module: nn.Module, family: Generator) -> None:
    """Fills a partitioned transformer from the family's files; every rank reads all and keeps its own pieces.

    Raises:
        ValueError: a parameter that no file holds.
    """
    parameters = dict(module.named_parameters())
    missing = set(parameters)
    for file in family.transformer_files():
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in parameters:
                    _fill(parameters[name], stream.get_tensor(name))
                    missing.discard(name)
    if missing:
        raise ValueError(f"{family.folder} lacks weights of {len(missing)} parameters, for example {min(missing)}")


def _fill_adapters(module: nn.Module, names: Sequence[str]) -> None:
    """Gives all adapters the same starting values, piece by piece: peft's own do not reach partitioned parameters."""
    for adapter in names:
        parameters = adapter_parameters(module, adapter)
        names_of_policy = {n: n.replace(f".{adapter}.", f".{ADAPTER}.") for n in parameters}
        values = initial_adapter({names_of_policy[n]: getattr(p, "ds_shape") for n, p in parameters.items()})  # noqa: B009
        for name, parameter in parameters.items():
            shard(parameter).zero_()
            _fill(parameter, values[names_of_policy[name]])


def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    """Overwrites this rank's piece of a parameter with its part of the whole tensor."""
    import torch.distributed as dist

    piece = shard(parameter)
    mine = whole.flatten()[dist.get_rank() * piece.numel() :][: piece.numel()]
    piece[: mine.numel()].copy_(mine)


def _gather_bucket(parameters: dict[str, nn.Parameter], pieces: list[Tensor]) -> dict[str, Tensor]:
    import torch.distributed as dist

    flat = torch.cat([piece.flatten() for piece in pieces])
    everywhere = [torch.empty_like(flat) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(flat, everywhere, dst=0)
    if everywhere is None:
        return {}
    whole, offset = {}, 0
    for (name, parameter), piece in zip(parameters.items(), pieces, strict=True):
        parts = [rank_flat[offset : offset + piece.numel()] for rank_flat in everywhere]
        full = torch.cat(parts)[: parameter.ds_numel]  # type: ignore[attr-defined]
        whole[name] = full.view(parameter.ds_shape).cpu()  # type: ignore[attr-defined]
        offset += piece.numel()
    return whole

"""Transformers that are partitioned by ZeRO-3 from the start: the policy in training, and frozen copies of it.

No rank ever holds a whole transformer: each builds only its pieces of the parameters, and fills them from the
safetensors files.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import LearnerPoolConfig, LoraConfig, OptimizerConfig
from euphonium.config.base import chosen
from euphonium.errors import TrainingError
from euphonium.generators.backbone import block_classes
from euphonium.generators.generator import Generator
from euphonium.generators.lora import ADAPTER, adapter_parameters, add_adapter, initial_adapter
from euphonium.generators.sequence import share_tokens
from learners.engine.engine import fill_piece, whole_shape
from learners.engine.options import Options, frozen_options, prefetch_blocks, training_options
from learners.engine.sequence import token_groups
from learners.engine.zero3 import ZeroEngine, drop_second_copies, shard

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig

# More elements than any parameter has: DeepSpeed then keeps all of them whole.
EVERY = 1 << 62


class ZeroPolicy(ZeroEngine):
    """The policy in training: a generator's transformer under ZeRO-3.

    Every update also updates the moving averages, if the recipe has any.

    Attributes:
        module: the partitioned transformer; ``model`` is DeepSpeed's engine around it.
        token_groups: the ranks that share samples, or None.
    """

    def __init__(
        self,
        family: Generator,
        pool: LearnerPoolConfig,
        optimizer: OptimizerConfig,
        lora: LoraConfig | None = None,
        frozen_adapters: Sequence[str] = (),
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Builds, loads and partitions the transformer.

        Args:
            family: the generator.
            pool: settings of the learner group.
            optimizer: settings of the optimiser.
            lora: settings of the low-rank adapter that is trained; None trains all weights.
            frozen_adapters: names of further adapters, for frozen references.
            start: whole weights of the trained parameters by name, in place of the generator's own.
        """
        whole = chosen(pool.shard, "pools.learner.shard") == "optimizer"
        whole_below = EVERY if whole else pool.persistence_threshold
        options = training_options(pool, optimizer, family.dtype, whole_below=whole_below)
        adapters = (ADAPTER, *frozen_adapters) if lora is not None else ()
        self.module = _loaded(family, lora, adapters, options)
        if lora is not None:
            _train_adapter(self.module, adapters)
        else:
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(family.trains(name))
        if start is not None:
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    _fill(parameter, start[name])
        drop_second_copies(self.module)
        place_buffers(self.module, _own_device())
        if pool.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()  # type: ignore[operator]
        # See gather_by_block: with adapters no input of the first block needs a gradient.
        if pool.gather_blocks and lora is None:
            prefetch_blocks(options, gather_by_block(self.module))
        self.token_groups = token_groups(pool.sequence_parallel)
        self._sharing = pool.sequence_parallel
        if self.token_groups is not None:
            share_tokens(self.module, family, self.token_groups)
            # Each rank has the gradient of its own tokens: what is reduced are parts of a sum, not samples of a mean.
            options["communication_data_type"] = "fp32"
        super().__init__(self.module, optimizer, options, averages=optimizer.averages)
        self._ema_decay = optimizer.ema_decay

    @override
    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients are averaged over all ranks, and those of ranks that share samples are parts of a sum.
        super().backward(loss * self._sharing, last=last)
        if last:
            self.update_averages(self._ema_decay)


def frozen_transformer(
    family: Generator, pool: LearnerPoolConfig, groups: ParallelConfig | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A partitioned transformer that is not trained; its weights are arbitrary until they are filled in.

    Args:
        family: the generator.
        pool: settings of the learner group.
        groups: the ranks that share samples, or None.

    Returns:
        DeepSpeed's engine around it, and this rank's pieces by name, which may be overwritten.
    """
    import deepspeed

    options = frozen_options(pool, family.dtype)
    with deepspeed.zero.Init(config_dict_or_path=options):
        module = family.build_transformer()
        if not all(family.trains(name) for name, _ in module.named_parameters()):
            # What is not trained is not filled in either.
            _load(module, family)
    module.requires_grad_(False)
    place_buffers(module, _own_device())
    if pool.gather_blocks:
        prefetch_blocks(options, gather_by_block(module))
    if groups is not None:
        share_tokens(module, family, groups)
    engine, *_ = deepspeed.initialize(model=module, config=options)
    engine.eval()
    return engine, {name: shard(p) for name, p in module.named_parameters() if family.trains(name)}


def place_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves all buffers to a rank's device: ``zero.Init`` places parameters alone, and DeepSpeed trusts that it did."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def _own_device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def gather_by_block(module: nn.Module) -> int:
    """Makes ZeRO-3 gather, release and reduce each transformer block as a whole, not layer by layer.

    DeepSpeed's hooks then run for some tens of blocks instead of hundreds of layers, and its collectives are fewer and
    larger; a rank holds the weights and gradients of one whole block at a time. Must be called before
    ``deepspeed.initialize``. DeepSpeed reduces a block's gradients once those of its inputs are there, so every block
    must have an input that needs a gradient, and be called once in a forward pass.

    Returns:
        Parameters of the largest block; 0 without blocks.
    """
    from deepspeed.utils import set_z3_leaf_modules

    blocks: list[nn.Module] = set_z3_leaf_modules(module, block_classes(module), raise_if_not_found=False)
    for block in blocks:
        signature = inspect.signature(block.forward)
        block.register_forward_pre_hook(functools.partial(_positional, signature), with_kwargs=True)
    return max((sum(whole_shape(p).numel() for p in block.parameters()) for block in blocks), default=0)


def _positional(
    signature: inspect.Signature, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Passes a block's inputs by position, because hooks of DeepSpeed and torch do not see keyword arguments."""
    bound = signature.bind(*args, **kwargs)
    if torch.is_grad_enabled() and not any(isinstance(a, Tensor) and a.requires_grad for a in bound.args):
        raise TrainingError(
            f"no input of a {type(block).__name__} needs a gradient, so that ZeRO-3 would lose gradients of its "
            "weights; set pools.learner.gather_blocks to false"
        )
    return bound.args, bound.kwargs


def _loaded(family: Generator, lora: LoraConfig | None, adapters: Sequence[str], options: Options) -> nn.Module:
    """The partitioned transformer with its weights, and with adapters whose values are still arbitrary."""
    import deepspeed

    # zero.Init patches torch's constructors, which may break a library that is imported meanwhile.
    family.transformer_class()
    with deepspeed.zero.Init(config_dict_or_path=options):
        module = family.build_transformer()
        _load(module, family)
        if lora is not None:
            for name in adapters:
                add_adapter(module, lora, name)
    return module


def _load(module: nn.Module, family: Generator) -> None:
    """Fills a partitioned transformer from the family's files; every rank reads all and keeps its own pieces.

    Raises:
        ValueError: a parameter is in no file.
    """
    parameters = dict(module.named_parameters())
    missing = set(parameters)
    for prefix, file in family.stored_weights():
        with safe_open(file, framework="pt") as stream:
            for stored in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                name = prefix + stored
                if name in parameters:
                    _fill(parameters[name], stream.get_tensor(stored))
                    missing.discard(name)
    if missing:
        raise ValueError(f"{family.folder} lacks weights of {len(missing)} parameters, for example {min(missing)}")


def _train_adapter(module: nn.Module, adapters: Sequence[str]) -> None:
    """Gives all adapters the same initial values, and makes only the policy's trainable."""
    for adapter in adapters:
        _fill_adapter(adapter_parameters(module, adapter), adapter)
    module.set_adapter(ADAPTER)  # type: ignore[operator]
    trained = adapter_parameters(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)


def _fill_adapter(parameters: Mapping[str, nn.Parameter], adapter: str) -> None:
    """Sets the initial values piece by piece: peft's own initialisation does not reach partitioned parameters."""
    names_of_policy = {n: n.replace(f".{adapter}.", f".{ADAPTER}.") for n in parameters}
    values = initial_adapter({names_of_policy[n]: whole_shape(p) for n, p in parameters.items()})
    for name, parameter in parameters.items():
        shard(parameter).zero_()
        _fill(parameter, values[names_of_policy[name]])


def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    import torch.distributed as dist

    fill_piece(shard(parameter), whole, dist.get_rank())

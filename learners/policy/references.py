"""Frozen copies of the policy under ZeRO-3: the KL's anchor, and the policy that drew the groups.

A copy is a module of its own whose parameters are partitioned like the policy's, without optimizer states: it costs
``parameters * bytes / world size`` on every rank, and nothing on the GPU with ``offload`` (the pieces then live in
host memory and travel layer by layer). Refreshing it copies pieces within each rank; nothing is communicated.

With low-rank adapters no copy of the base is needed: the references are further adapters of the same module
(:class:`AdapterReference`), and the anchor before training is the base with all adapters off.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from euphonium.config import LearnerPoolConfig
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.lora import ADAPTER
from learners.engine.zero3 import ZeroPolicy, gather_by_block, shard


class Reference(Protocol):
    """A frozen policy."""

    def refresh(self, policy: ZeroPolicy) -> None:
        """Takes over the policy's current weights."""
        ...

    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Its output, without gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """This rank's pieces, for a checkpoint."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes over pieces of :meth:`state`."""
        ...


class FrozenCopy:
    """A reference of its own under ZeRO-3, for policies that are trained whole."""

    def __init__(self, family: Generator, pool: LearnerPoolConfig, policy: ZeroPolicy) -> None:
        import deepspeed

        offload = {"offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": family.dtype == torch.bfloat16},
            "zero_optimization": {
                "stage": 3,
                # Pieces are the truth here: a parameter that is kept whole would not see a refresh.
                "stage3_param_persistence_threshold": 0,
                "memory_efficient_linear": False,
                **(offload if pool.offload_references else {}),
            },
            "steps_per_print": 10**9,
        }
        with deepspeed.zero.Init(config_dict_or_path=settings):
            module = family.build_transformer()
        module.requires_grad_(False)
        if pool.gather_blocks:
            gather_by_block(module)
        self._family = family
        self._engine, *_ = deepspeed.initialize(model=module, config=settings)
        self._engine.eval()
        self._pieces = {name: shard(p) for name, p in self._engine.module.named_parameters()}
        self.refresh(policy)

    def refresh(self, policy: ZeroPolicy) -> None:
        """See :class:`Reference`."""
        for name, parameter in policy.parameters.items():
            self._pieces[name].copy_(shard(parameter))

    @torch.no_grad()
    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """See :class:`Reference`."""
        return self._family.velocity(self._engine, x, time, conditioning)

    def state(self) -> dict[str, Tensor]:
        """See :class:`Reference`."""
        return {name: piece.cpu() for name, piece in self._pieces.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See :class:`Reference`."""
        for name, piece in self._pieces.items():
            piece.copy_(state[name])


class AdapterReference:
    """A reference that is another adapter of the policy's own module."""

    def __init__(self, family: Generator, policy: ZeroPolicy, adapter: str | None) -> None:
        """Args as described in the class.

        Args:
            family: of the generator.
            policy: whose module it is.
            adapter: name of a frozen adapter, or None for the base without any.
        """
        self._family = family
        self._policy = policy
        self._adapter = adapter
        self._pieces: dict[str, Tensor] = {}
        if adapter is not None:
            self._pieces = {
                name.replace(f".{adapter}.", f".{ADAPTER}."): shard(p)
                for name, p in policy.module.named_parameters()
                if f".{adapter}." in name
            }
            self.refresh(policy)

    def refresh(self, policy: ZeroPolicy) -> None:
        """See :class:`Reference`; the base never changes."""
        for name, piece in self._pieces.items():
            piece.copy_(shard(policy.parameters[name]))

    @torch.no_grad()
    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """See :class:`Reference`."""
        module: Any = self._policy.module
        if self._adapter is None:
            module.disable_adapters()
        else:
            module.set_adapter(self._adapter)
        try:
            return self._family.velocity(self._policy.engine, x, time, conditioning)
        finally:
            if self._adapter is None:
                module.enable_adapters()
            module.set_adapter(ADAPTER)
            _trainable(module, self._policy.parameters)

    def state(self) -> dict[str, Tensor]:
        """See :class:`Reference`."""
        return {name: piece.cpu() for name, piece in self._pieces.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See :class:`Reference`."""
        for name, piece in self._pieces.items():
            piece.copy_(state[name])


def _trainable(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Restores which parameters are trained: switching adapters changes it."""
    trained = {id(p) for p in parameters.values()}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trained)

"""Frozen references under ZeRO-3: the KL penalty's anchor, and the policy that drew the groups.

A frozen copy is a module of its own whose parameters are partitioned like the policy's, without optimizer states. It
costs ``parameters * bytes / world size`` on every rank, or nothing on the GPU with ``offload_references`` (the pieces
are then in host memory and travel layer by layer). Refreshing it copies pieces within each rank, without
communication.

With low-rank adapters no copy of the base model is needed: references are further adapters of the same module
(:class:`AdapterReference`), and the policy before training is the base model with all adapters off.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import LearnerPoolConfig
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.lora import ADAPTER
from learners.engine.partitioned import ZeroPolicy, frozen_transformer
from learners.engine.zero3 import shard


class Reference(Protocol):
    """A frozen policy."""

    def refresh(self, policy: ZeroPolicy) -> None:
        """Copies the policy's current weights."""
        ...

    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The reference's output, without gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """This rank's pieces, for a checkpoint."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restores pieces that :meth:`state` returned."""
        ...


class _Pieces(Reference):
    """Base of both kinds of references: this rank's pieces, under the policy's names."""

    _pieces: dict[str, Tensor]

    @override
    def refresh(self, policy: ZeroPolicy) -> None:
        for name in self._pieces.keys() & policy.parameters.keys():
            self._pieces[name].copy_(shard(policy.parameters[name]))

    @override
    def state(self) -> dict[str, Tensor]:
        return {name: piece.cpu() for name, piece in self._pieces.items()}

    @override
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, piece in self._pieces.items():
            piece.copy_(state[name])


class FrozenCopy(_Pieces):
    """A reference with a transformer of its own, for policies whose weights are all trained.

    Args:
        family: the generator.
        pool: settings of the learner group.
        policy: the policy whose weights are copied at the start.
    """

    def __init__(self, family: Generator, pool: LearnerPoolConfig, policy: ZeroPolicy) -> None:
        self._family = family
        self._engine, self._pieces = frozen_transformer(family, pool, policy.token_groups)
        self.refresh(policy)

    @override
    @torch.no_grad()
    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self._family.velocity(self._engine, x, time, conditioning)


class AdapterReference(_Pieces):
    """A reference that is another adapter of the policy's own module, or that module with all adapters off.

    Args:
        family: the generator.
        policy: the policy whose module is used.
        adapter: name of a frozen adapter, or None for the base model, which never changes.
    """

    def __init__(self, family: Generator, policy: ZeroPolicy, adapter: str | None) -> None:
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

    @override
    def refresh(self, policy: ZeroPolicy) -> None:
        super().refresh(policy)
        policy.weights_changed()

    @override
    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self._policy.weights_changed()

    @override
    @torch.no_grad()
    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        module: Any = self._policy.module
        if self._adapter is None:
            module.disable_adapters()
        else:
            module.set_adapter(self._adapter)
        try:
            return self._family.velocity(self._policy.model, x, time, conditioning)
        finally:
            if self._adapter is None:
                module.enable_adapters()
            module.set_adapter(ADAPTER)
            _trainable(module, self._policy.parameters)


def _trainable(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Restores which parameters require gradients: switching adapters changes it."""
    trained = {id(p) for p in parameters.values()}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trained)

"""The engine of a single process: plain torch, where every piece is a whole parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import RewardOptimizerConfig
from learners.engine.engine import Engine, HeldKind, adamw


class LocalEngine(Engine):
    """Trains a float32 model in this process.

    Args:
        model: the model; parameters that require gradients are trained.
        settings: settings of the optimiser.
        device: device that the model is moved to.
        averages: whether to keep moving averages.
        unreached: whether parameters without gradients (those after the last block that a trunk uses) are updated too,
            so that weight decay applies to them, as under ZeRO-3.
    """

    def __init__(
        self, model: nn.Module, settings: RewardOptimizerConfig, device: torch.device, *, averages: bool = True,
        unreached: bool = True,
    ) -> None:  # fmt: skip
        model.to(device).train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, trained, adamw(trained.values(), settings), device, averages=averages)
        self._clip = settings.max_grad_norm
        self._unreached = unreached

    @override
    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        if last:
            for parameter in self.parameters.values() if self._unreached else ():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self._clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @override
    def weights_changed(self) -> None:
        """Does nothing: pieces are the parameters themselves."""

    @override
    def _stepped(self) -> Iterable[Tensor]:
        return self.parameters.values()

    @override
    def _held(self, kind: HeldKind, parameter: nn.Parameter) -> Tensor:
        held = parameter.data if kind in ("weights", "master") else self.optimizer.state[parameter][kind]
        return held.view(-1)

    @override
    def _set_held(self, kind: HeldKind, parameter: nn.Parameter, piece: Tensor) -> None:
        self._held(kind, parameter).copy_(piece)

"""How a reward model is stepped: in this process, or under ZeRO-3; the training loop sees no difference.

Both engines keep weights, Adam's moments and moving averages in float32, as one flat piece a parameter and rank.
A checkpoint holds whole tensors in safetensors, so it can be taken up by another number of ranks, and by either
engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from euphonium.config import LearnerPoolConfig, OptimizerConfig, RewardOptimizerConfig
from learners.engine.zero3 import MOMENTS, deepspeed_config, quiet_deepspeed, shard

KINDS = ("weights", "average", *MOMENTS)


class RewardEngine(ABC):
    """A model in training.

    Attributes:
        model: to call; under ZeRO-3 the engine that gathers parameters for each layer.
        parameters: the trained ones by name, in a fixed order.
        device: of the model.
        rank: of this process.
        world_size: processes that train together.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    device: torch.device
    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._averages = [piece.clone() for piece in self._pieces("weights")]

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients of one micro-batch; with ``last``, reduces them over the ranks and updates the weights."""

    @abstractmethod
    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, on every rank."""

    @abstractmethod
    def _pieces(self, kind: str) -> list[Tensor]:
        """This rank's piece of each parameter, flat: memory of the weights, or copies of the optimizer's moments."""

    @abstractmethod
    def _set_pieces(self, kind: str, pieces: list[Tensor]) -> None:
        """Overwrites this rank's pieces of weights or moments."""

    @abstractmethod
    def _whole(self, parameter: nn.Parameter, piece: Tensor) -> Tensor | None:
        """The whole tensor on rank 0, on the CPU, from all ranks' pieces."""

    @abstractmethod
    def _mine(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Tells the optimizer how many updates its moments come from."""

    @abstractmethod
    def _forget_whole(self) -> None:
        """Drops whole parameters that were gathered from pieces that have changed since."""

    def update_average(self, decay: float) -> None:
        """Moves the averages towards the current weights."""
        torch._foreach_lerp_(self._averages, self._pieces("weights"), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While open, the model computes with the moving averages, in evaluation mode."""
        current = self._pieces("weights")
        kept = [piece.clone() for piece in current]
        torch._foreach_copy_(current, self._averages)
        self._forget_whole()
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            torch._foreach_copy_(current, kept)
            self._forget_whole()
            self.model.train()

    def whole(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind (``KINDS``) on rank 0, empty elsewhere; all ranks must call it."""
        pieces = self._averages if kind == "average" else self._pieces(kind)
        found = {}
        for (name, parameter), piece in zip(self.parameters.items(), pieces, strict=True):
            tensor = self._whole(parameter, piece)
            if tensor is not None:
                found[name] = tensor
        return found

    def restore(self, kind: str, read: Callable[[str], Tensor]) -> None:
        """Takes over all tensors of a kind.

        Args:
            kind: one of ``KINDS``.
            read: gives a whole tensor by its parameter's name.
        """
        pieces = [self._mine(read(name)).to(self.device) for name in self.parameters]
        if kind == "average":
            torch._foreach_copy_(self._averages, pieces)
        else:
            self._set_pieces(kind, pieces)


class LocalEngine(RewardEngine):
    """One process, plain torch."""

    def __init__(self, model: nn.Module, settings: RewardOptimizerConfig, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.device = device
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._clip = settings.max_grad_norm
        self._optimizer = _adamw(self.parameters, settings)
        super().__init__()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See :class:`RewardEngine`."""
        loss.backward()
        if last:
            for parameter in self.parameters.values():
                # Weights that the reward does not depend on (what a trunk does after its last block) decay, no more,
                # as under ZeRO-3.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        """See :class:`RewardEngine`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def sum(self, values: Tensor) -> Tensor:
        """See :class:`RewardEngine`."""
        return values

    def _pieces(self, kind: str) -> list[Tensor]:
        if kind == "weights":
            return [p.data.view(-1) for p in self.parameters.values()]
        return [self._state(p)[kind].view(-1) for p in self.parameters.values()]

    def _set_pieces(self, kind: str, pieces: list[Tensor]) -> None:
        torch._foreach_copy_(self._pieces(kind), pieces)

    def _forget_whole(self) -> None:
        """Nothing to drop: pieces are the parameters."""

    def _whole(self, parameter: nn.Parameter, piece: Tensor) -> Tensor | None:
        # A copy also on the CPU: what is being saved must not move on with the training.
        return piece.detach().view(parameter.shape).cpu().clone()

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.flatten()

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {name: torch.zeros_like(parameter) for name in MOMENTS}
        return state

    def set_steps(self, steps: int) -> None:
        """See :class:`RewardEngine`."""
        for parameter in self.parameters.values():
            self._state(parameter)["step"].fill_(steps)


class ZeroEngine(RewardEngine):
    """One rank of a group under DeepSpeed ZeRO-3; torch.distributed must be up."""

    def __init__(
        self, model: nn.Module, settings: RewardOptimizerConfig, pool: LearnerPoolConfig, device: torch.device
    ) -> None:
        import torch.distributed as dist

        quiet_deepspeed()
        import deepspeed

        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        options = deepspeed_config(
            pool,
            OptimizerConfig(learning_rate=settings.learning_rate, max_grad_norm=settings.max_grad_norm),
            torch.float32,
        )
        # Averages are swapped in piece by piece; a parameter that is kept whole would not see it.
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model, *_ = deepspeed.initialize(model=model, optimizer=_adamw(trained, settings), config=options)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                # Its forward reads the weights of a submodule that it never calls.
                for parameter in module.out_proj.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)
        self.model.train()
        self.parameters = trained
        super().__init__()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See :class:`RewardEngine`."""
        engine: Any = self.model
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()

    def set_learning_rate(self, rate: float) -> None:
        """See :class:`RewardEngine`."""
        engine: Any = self.model
        for group in engine.optimizer.param_groups:
            group["lr"] = rate

    def sum(self, values: Tensor) -> Tensor:
        """See :class:`RewardEngine`."""
        import torch.distributed as dist

        there = values.to(self.device)
        dist.all_reduce(there)
        return there.to(values.device)

    def _pieces(self, kind: str) -> list[Tensor]:
        if kind == "weights":
            return [shard(p) for p in self.parameters.values()]
        from deepspeed.utils import safe_get_local_optimizer_state

        self._make_moments()
        return [safe_get_local_optimizer_state(p, kind) for p in self.parameters.values()]

    def _set_pieces(self, kind: str, pieces: list[Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self._make_moments()
        for parameter, piece in zip(self.parameters.values(), pieces, strict=True):
            if kind == "weights":
                shard(parameter).copy_(piece)
                safe_set_local_fp32_param(parameter, piece)
            else:
                safe_set_local_optimizer_state(parameter, piece, kind)
        self._forget_whole()

    def _whole(self, parameter: nn.Parameter, piece: Tensor) -> Tensor | None:
        import torch.distributed as dist

        parts = [torch.empty_like(piece) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(piece.contiguous(), parts, dst=0)
        if parts is None:
            return None
        flat = torch.cat(parts)[: parameter.ds_numel]  # type: ignore[attr-defined]
        return flat.view(parameter.ds_shape).cpu()  # type: ignore[attr-defined]

    def _mine(self, whole: Tensor) -> Tensor:
        size = -(-whole.numel() // self.world_size)
        piece = whole.new_zeros(size)
        mine = whole.flatten()[self.rank * size :][:size]
        piece[: mine.numel()] = mine
        return piece

    def _forget_whole(self) -> None:
        # DeepSpeed keeps what the next pass of the same kind will want first; passes without gradients never end one.
        engine: Any = self.model
        engine.empty_partition_cache()

    def set_steps(self, steps: int) -> None:
        """See :class:`RewardEngine`."""
        for state in self._make_moments():
            state["step"].fill_(steps)

    def _make_moments(self) -> list[dict[str, Any]]:
        """Adam's states of this rank, which do not exist before its first step."""
        engine: Any = self.model
        inner = engine.optimizer
        states = []
        for flat in inner.fp32_partitioned_groups_flat:
            state: dict[str, Any] = inner.optimizer.state[flat]
            if not state:
                state |= {"step": torch.tensor(0.0)} | {name: torch.zeros_like(flat) for name in MOMENTS}
            states.append(state)
        return states


def _adamw(parameters: dict[str, nn.Parameter], settings: RewardOptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(parameters.values()), lr=settings.learning_rate, eps=settings.eps, weight_decay=settings.weight_decay
    )

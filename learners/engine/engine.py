"""A model in training: how it is stepped, averaged, gathered, saved and restored.

Training loops use an :class:`Engine`, and need not know whether the weights are whole in this process
(learners/engine/local.py) or partitioned over the ranks of a group (learners/engine/zero3.py). Every rank holds one
contiguous piece of every flattened parameter, of its float32 master copy, of Adam's moments and of its moving average;
in one process a piece is the whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from euphonium.config import OptimizerConfig, RewardOptimizerConfig
from euphonium.wire.weights.manifest import split_into_buckets

HeldKind = Literal["weights", "master", "exp_avg", "exp_avg_sq"]
Kind = HeldKind | Literal["average"]

# Adam's states of a parameter.
MOMENTS: tuple[HeldKind, ...] = ("exp_avg", "exp_avg_sq")
# Bytes of whole tensors that are gathered at a time where nobody asks for less.
BUCKET = 1 << 28


class Engine(ABC):
    """One rank's part of a model in training, with its optimizer.

    Attributes:
        model: the module to call; under ZeRO-3 DeepSpeed's engine, which gathers parameters layer by layer.
        parameters: the trained parameters by name, in a fixed order.
        optimizer: optimizer of these parameters.
        device: device of the model.
        averages: float32 moving averages of this rank's pieces by name, or None.
        rank: rank of this process.
        world_size: number of processes that train together.
    """

    rank = 0
    world_size = 1

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW,
        device: torch.device, *, averages: bool,
    ) -> None:  # fmt: skip
        self.model, self.parameters, self.optimizer, self.device = model, parameters, optimizer, device
        self.averages: dict[str, Tensor] | None = None
        if averages:
            self.averages = {name: self.piece("weights", name).float().clone() for name in parameters}

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients of one micro-batch; with ``last``, reduces them over the ranks and updates the weights."""

    @abstractmethod
    def weights_changed(self) -> None:
        """Must follow overwritten pieces: refreshes the whole copies of parameters that the engine keeps."""

    @abstractmethod
    def _held(self, kind: HeldKind, parameter: nn.Parameter) -> Tensor:
        """This rank's flat piece of a parameter, its master copy or a moment; for weights, the model's own memory."""

    @abstractmethod
    def _set_held(self, kind: HeldKind, parameter: nn.Parameter, piece: Tensor) -> None:
        """Overwrites one of this rank's pieces; weights and master copy are set together."""

    @abstractmethod
    def _stepped(self) -> Iterable[Tensor]:
        """The tensors that the optimizer updates."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def steps(self) -> int:
        """Number of updates that Adam has made; 0 before the first, when it has no moments."""
        return max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)

    def make_moments(self, steps: int) -> None:
        """Creates Adam's moments before the first update, with a count of ``steps`` updates."""
        for tensor in self._stepped():
            state = self.optimizer.state[tensor]
            if "step" not in state:
                state |= {"step": torch.tensor(0.0)} | {name: torch.zeros_like(tensor) for name in MOMENTS}
            state["step"].fill_(float(steps))

    def piece(self, kind: Kind, name: str) -> Tensor:
        """This rank's flat piece of a tensor, for reading."""
        return self._averages()[name] if kind == "average" else self._held(kind, self.parameters[name])

    def set_piece(self, kind: Kind, name: str, piece: Tensor) -> None:
        """Overwrites one of this rank's pieces; :meth:`weights_changed` must follow the last one."""
        if kind == "average":
            self._averages()[name].copy_(piece)
        else:
            self._set_held(kind, self.parameters[name], piece)

    def update_averages(self, decay: float) -> None:
        """Updates the moving averages, if there are any, with the current weights."""
        # One by one: all pieces at once in float32 would be a second copy of what this rank holds.
        for name, average in (self.averages or {}).items():
            average.lerp_(self.piece("weights", name).float(), 1 - decay)

    def restore_averages(self, read: Callable[[str], Tensor]) -> None:
        """Sets the moving averages to whole tensors, which ``read`` returns by name."""
        for name, average in self._averages().items():
            fill_piece(average, read(name), self.rank)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While open, the model computes with the moving averages, in evaluation mode."""
        current = [self.piece("weights", name) for name in self.parameters]
        kept = [piece.clone() for piece in current]
        torch._foreach_copy_(current, list(self._averages().values()))
        self.weights_changed()
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            torch._foreach_copy_(current, kept)
            self.weights_changed()
            self.model.train()

    def _averages(self) -> dict[str, Tensor]:
        if self.averages is None:
            raise ValueError("this engine keeps no moving averages")
        return self.averages

    # --- among the ranks; all must call these ---------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, the same on every rank."""
        if self.world_size == 1:
            return values
        there = values.to(self.device)
        torch.distributed.all_reduce(there)
        return there.to(values.device)

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def whole(self, kind: Kind) -> dict[str, Tensor]:
        """Copies of all tensors of a kind by name, on the CPU of rank 0; empty elsewhere."""
        found: dict[str, Tensor] = {}
        for bucket in self._gathered(kind, BUCKET):
            found |= on_cpu(bucket)
        return found

    def gathered(self, bucket_bytes: int, *, average: bool = False) -> Iterator[dict[str, Tensor]]:
        """Gathers whole weights on rank 0, bucket by bucket; all ranks must iterate to the end.

        Args:
            bucket_bytes: bytes of a bucket's whole tensors.
            average: gather the moving averages, if there are any, instead of the weights, in the weights' type.

        Yields:
            On rank 0 the tensors of the bucket by name, on the model's device; elsewhere an empty mapping.
        """
        return self._gathered("average" if average and self.averages is not None else "weights", bucket_bytes)

    def _gathered(self, kind: Kind, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
        sizes = {name: whole_shape(p).numel() * p.element_size() for name, p in self.parameters.items()}
        for names in split_into_buckets(sizes, bucket_bytes):
            pieces = [self.piece(kind, name).to(self.parameters[name].dtype) for name in names]
            flat = torch.cat(pieces)
            everywhere = [flat]
            if self.world_size > 1:
                everywhere = [torch.empty_like(flat) for _ in range(self.world_size)] if self.rank == 0 else []
                torch.distributed.gather(flat, everywhere or None, dst=0)
            # Each rank's part is cut into the pieces that the bucket was made of.
            parts = [part.split([piece.numel() for piece in pieces]) for part in everywhere]
            yield {
                name: _joined([part[i] for part in parts], whole_shape(self.parameters[name]))
                for i, name in enumerate(names if parts else ())
            }


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also if it is partitioned."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def fill_piece(piece: Tensor, whole: Tensor, rank: int) -> None:
    """Overwrites a rank's flat piece of a tensor with its part of the whole tensor; padding stays as it is."""
    mine = whole.flatten()[rank * piece.numel() :][: piece.numel()]
    piece[: mine.numel()].copy_(mine)


def _joined(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """Joins all ranks' pieces to the whole tensor, without padding."""
    return torch.cat(pieces)[: shape.numel()].view(shape)


def on_cpu(bucket: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bucket's tensors on the CPU."""
    return {name: tensor.cpu() for name, tensor in bucket.items()}


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig | RewardOptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a recipe; its learning rate is set before every update."""
    betas = settings.betas if isinstance(settings, OptimizerConfig) else (0.9, 0.999)
    return torch.optim.AdamW(
        list(parameters), lr=settings.learning_rate, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay
    )

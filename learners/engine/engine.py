"""A model in training: what a process holds of it, how it is stepped, averaged, read out and restored.

Training loops see an :class:`Engine`; whether the weights lie in this process (learners/engine/local.py) or in pieces
on the ranks of a group (learners/engine/zero3.py) is the engine's business. Every rank holds one contiguous piece of
every flattened parameter, of its float32 master, of Adam's moments and of its moving average; in one process a piece
is the whole.
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
        model: to call; under ZeRO-3 the engine that gathers parameters for each layer.
        parameters: the trained ones by name, in a fixed order.
        optimizer: of these.
        device: of the model.
        averages: float32 moving averages of this rank's pieces by name, or None.
        rank: of this process.
        world_size: processes that train together.
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
        """Has whole parameters that are held anywhere show the pieces, which have changed."""

    @abstractmethod
    def _held(self, kind: HeldKind, parameter: nn.Parameter) -> Tensor:
        """This rank's piece of a parameter, its master or a moment, flat; of a parameter as memory of the model."""

    @abstractmethod
    def _set_held(self, kind: HeldKind, parameter: nn.Parameter, piece: Tensor) -> None:
        """Overwrites one of this rank's pieces; a parameter and its master are set together."""

    @abstractmethod
    def _stepped(self) -> Iterable[Tensor]:
        """The tensors that the optimizer steps."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def steps(self) -> int:
        """Updates that Adam has counted; 0 before the first, when it has no moments yet."""
        return max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)

    def make_moments(self, steps: int) -> None:
        """Has Adam's moments exist before the first update, as of ``steps`` updates."""
        for tensor in self._stepped():
            state = self.optimizer.state[tensor]
            if "step" not in state:
                state |= {"step": torch.tensor(0.0)} | {name: torch.zeros_like(tensor) for name in MOMENTS}
            state["step"].fill_(float(steps))

    def piece(self, kind: Kind, name: str) -> Tensor:
        """This rank's piece of a tensor, flat; to be read."""
        return self._averages()[name] if kind == "average" else self._held(kind, self.parameters[name])

    def set_piece(self, kind: Kind, name: str, piece: Tensor) -> None:
        """Overwrites one of this rank's pieces; :meth:`weights_changed` must follow the last one."""
        if kind == "average":
            self._averages()[name].copy_(piece)
        else:
            self._set_held(kind, self.parameters[name], piece)

    def update_averages(self, decay: float) -> None:
        """Moves the averages, if there are any, towards the current weights."""
        # One by one: all pieces at once in float32 would be a second copy of what this rank holds.
        for name, average in (self.averages or {}).items():
            average.lerp_(self.piece("weights", name).float(), 1 - decay)

    def restore_averages(self, read: Callable[[str], Tensor]) -> None:
        """Takes over whole tensors, which ``read`` gives by name, as the averages."""
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
        """Sum over the ranks, on every rank."""
        if self.world_size == 1:
            return values
        there = values.to(self.device)
        torch.distributed.all_reduce(there)
        return there.to(values.device)

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def whole(self, kind: Kind) -> dict[str, Tensor]:
        """Copies of all tensors of a kind by name, on the CPU of rank 0; empty elsewhere."""
        found: dict[str, Tensor] = {}
        for bucket in self._gathered(kind, BUCKET):
            found |= bucket
        return found

    def gathered(self, bucket_bytes: int, *, average: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collects full weights on rank 0, bucket by bucket; all ranks must iterate to the end.

        Args:
            bucket_bytes: size of a bucket, by what its tensors take when whole.
            average: collect the moving averages, if there are any, instead of the weights, in the weights' type.

        Yields:
            On rank 0 the tensors of the bucket by name, on the CPU; elsewhere an empty mapping.
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
            # Of each rank's part, cut as the bucket was put together.
            parts = [part.split([piece.numel() for piece in pieces]) for part in everywhere]
            yield {
                name: _joined([part[i] for part in parts], whole_shape(self.parameters[name]))
                for i, name in enumerate(names if parts else ())
            }


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter when whole, also of one that is partitioned."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def fill_piece(piece: Tensor, whole: Tensor, rank: int) -> None:
    """Overwrites a rank's flat piece of a tensor with its part of the whole one; padding stays."""
    mine = whole.flatten()[rank * piece.numel() :][: piece.numel()]
    piece[: mine.numel()].copy_(mine)


def _joined(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """The whole tensor of all ranks' pieces, on the CPU; what is beyond its end is padding."""
    return torch.cat(pieces)[: shape.numel()].view(shape).cpu()


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig | RewardOptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a recipe; its rate is set before every update."""
    betas = settings.betas if isinstance(settings, OptimizerConfig) else (0.9, 0.999)
    return torch.optim.AdamW(
        list(parameters), lr=settings.learning_rate, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay
    )

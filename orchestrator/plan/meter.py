"""Measures a computation without doing it: on the meta device, operation by operation, as eager PyTorch would run it.

Counts the storages that are alive after every operation, and floating-point operations. Attention counts as a fused
kernel, which keeps queries, keys, values, its output and a logarithm a row for the backward pass. What kernels need
inside themselves is not seen, but for the copies in another layout that cuDNN's convolutions make of input and output:
on an H100 they are what decoding takes above its tensors, to 2 % for whole clips and 5 % for tiles.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
# torch hands cuDNN a batch of more elements than it can count in parts of about this many.
COUNTED, PART = 1 << 31, 1 << 29


@dataclass(frozen=True)
class Cost:
    """What a computation takes.

    Attributes:
        peak_bytes: most bytes that it held at once, without what was alive before.
        matmul_flops: floating-point operations of matrix products and attention.
        conv_flops: floating-point operations of convolutions.
        workspace_bytes: what convolutions take on top of the peak.
        largest: elements of its largest tensor.
    """

    peak_bytes: float
    matmul_flops: float
    conv_flops: float
    workspace_bytes: float = 0
    largest: float = 0

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.matmul_flops + self.conv_flops


# Bytes that a kernel takes for a while on top of a convolution's input and output.
Copies = Callable[[Tensor, Tensor], float]


def cudnn_copies(taken: Tensor, made: Tensor) -> float:
    """Bytes of a convolution's input and output once more, of as many samples as cuDNN gets at a time."""
    samples, largest = len(taken), max(taken.numel(), made.numel())
    at_a_time = samples if largest < COUNTED else max(1, PART * samples // largest)
    return (taken.nbytes + made.nbytes) * at_a_time / samples


def measure(run: Callable[[], object], resident: Iterable[Tensor] = (), copies: Copies = cudnn_copies) -> Cost:
    """Costs of a computation on tensors of the meta device, or of any other.

    Args:
        run: the computation.
        resident: tensors that were there before, such as weights, which do not count.
        copies: what convolutions take besides, on the device that is planned for.
    """
    meter = _Meter(resident, copies)
    with _fused_attention(meter), meter:
        result = run()
    del result
    return Cost(meter.peak, meter.matmul_flops, meter.conv_flops, meter.worst - meter.peak, meter.largest)


class _Meter(TorchDispatchMode):
    """Counts living storages and operations of every call of a kernel."""

    def __init__(self, resident: Iterable[Tensor], copies: Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._copies = copies
        self.peak = 0
        # The peak with the copies that convolutions make.
        self.worst = 0.0
        self.largest = 0
        self.matmul_flops = 0.0
        self.conv_flops = 0.0
        self._living = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in resident}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = _without_data(func, args) if _asks_for_data(func, args) else func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            if func._overloadpacket in (aten.convolution, aten.convolution_backward):
                self.conv_flops += flops
            else:
                self.matmul_flops += flops
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if func is aten.convolution.default:
            self.worst = max(self.worst, self._living + self._copies(args[0], out))
        return out

    def _note(self, tensor: Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._living += storage.nbytes()
        self.peak = max(self.peak, self._living)
        self.worst = max(self.worst, self.peak)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._living -= self._sizes.pop(key, 0)


def _asks_for_data(func: Any, args: tuple[Any, ...]) -> bool:
    if func is aten._local_scalar_dense.default:
        return bool(args[0].is_meta)
    if func is aten.index.Tensor:
        return any(index is not None and index.is_meta and index.dtype == torch.bool for index in args[1])
    return func is aten.bitwise_not.default and args[0].is_meta and args[0].dtype == torch.bool


def _without_data(func: Any, args: tuple[Any, ...]) -> Any:
    """The answer for masks of which every entry is true, as prompts are trimmed, and for conditions, which hold."""
    if func is aten._local_scalar_dense.default:
        return True
    if func is aten.bitwise_not.default:
        negated = torch.empty_like(args[0])
        negated.selects_nothing = True  # type: ignore[attr-defined]
        return negated
    tensor, (mask, *_) = args
    count = 0 if getattr(mask, "selects_nothing", False) else mask.numel()
    return tensor.new_empty((count, *tensor.shape[mask.dim() :]))


@contextmanager
def _fused_attention(meter: _Meter) -> Iterator[None]:
    """Replaces ``scaled_dot_product_attention``, which the meta device would compute in parts, while it is open.

    A function mode of torch would not do: it is off in the backward pass, where checkpoints are computed again.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # The kernels take additive masks only: a boolean one is converted first.
            attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
        out: Tensor = _Attention.apply(query, key, value, meter)  # type: ignore[no-untyped-call]  # as above
        return out

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


class _Attention(torch.autograd.Function):
    """A fused attention kernel: shapes, what it keeps, and its operations."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: _Meter) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        logarithms = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, logarithms)
        ctx.meter = meter
        meter.matmul_flops += _products(query, key, value, 1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, _, _ = ctx.saved_tensors
        # Three products of the keys' width, one of them to recompute the scores, and two of the values'.
        ctx.meter.matmul_flops += _products(query, key, value, 2.5)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _products(query: Tensor, key: Tensor, value: Tensor, times: float) -> float:
    """Operations of the two products of attention, ``times`` over."""
    rows = query.numel() // query.shape[-1]
    return times * 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])

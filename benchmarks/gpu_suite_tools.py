"""What the parts of gpu_suite.py share: sizes, networks, timing, attention kernels, and the record of a part."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from guided_step_measures import FlopCount, Stopwatch, Work
from guided_step_networks import FULL, TINY, Setup, build_generator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from euphonium.generators.generator import Generator

Value = float | int | str | bool | None
Values = dict[str, Value]

# The published recipes' clips: 480x480, 29 frames, so latents of 16x8x60x60.
CLIP = dataclasses.replace(FULL, model=FULL.model | {"frames": 29})
# Lines of a traceback that are kept.
TRACEBACK_LINES = 6

# ``as built``: whatever the generator hands to attention; ``none``: without a mask; ``all true``: with one that masks
# nothing, where there is none.
Mask = Literal["as built", "none", "all true"]
Backend = Literal["default", "math", "flash", "efficient", "cudnn"]
BACKENDS: dict[Backend, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Record:
    """The measurements of one part, on disk after each of them.

    Attributes:
        small: whether tiny sizes are wanted.
        device: device to measure on.
        deadline: time of :func:`time.time` at which the part is stopped.
    """

    def __init__(self, file: Path, deadline: float, *, small: bool) -> None:
        self._file = file
        self._rows: list[Values] = []
        self.deadline = deadline
        self.small = small
        gpu = torch.cuda.is_available() and not small
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")

    def measure(self, name: str, work: Callable[[], Mapping[str, Value]]) -> Values | None:
        """Notes what a measurement returns, or why it failed; a part goes on after a failure.

        Returns:
            The values, None after a failure.
        """
        began = time.perf_counter()
        try:
            values = dict(work())
        except Exception:
            lines = traceback.format_exc().strip().splitlines()
            self._add({"name": name, "error": "\n".join(lines[-TRACEBACK_LINES:])}, began)
            values = None
        # Outside the except block: the traceback kept the failed pass's tensors alive.
        if values is None:
            release(self.device)
        else:
            self._add({"name": name, **values}, began)
        return values

    def skip(self, name: str, reason: str) -> None:
        """Notes a measurement that this machine does not allow."""
        self._add({"name": name, "skipped": reason}, time.perf_counter())

    def _add(self, row: Values, began: float) -> None:
        row["took_s"] = round(time.perf_counter() - began, 2)
        self._rows.append(row)
        self._file.write_text(json.dumps(self._rows))
        print(json.dumps(row), flush=True)


def release(device: torch.device) -> None:
    """Returns memory that nothing uses to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(work: Work, device: torch.device, repeats: int = 3, *, count: bool = True) -> Values:
    """Time, arithmetic and memory of some work, which is done once more before the clock runs.

    Args:
        work: a function without arguments.
        device: device that it computes on.
        repeats: timed calls; fewer where one takes over two seconds.
        count: whether to count its floating-point operations, which compiled code hides.

    Returns:
        ``seconds`` (the median), ``slowest_s``, ``peak_gib`` (largest allocated memory; None without a GPU), and with
        ``count`` ``tflop`` and ``tflop_per_s``.
    """
    counter = FlopCount()
    with counter if count else nullcontext():
        work()
    watch = Stopwatch([device], 0, 1)
    times = watch.times(work)
    (peak,) = watch.peaks()
    more = Stopwatch([device], 0, repeats - 1 if times[0] < 2000 else 0)
    times += more.times(work)
    seconds = statistics.median(times) / 1000
    values: Values = {"seconds": seconds, "slowest_s": max(times) / 1000, "peak_gib": peak}
    if count:
        values |= {"tflop": counter.total / 1e12, "tflop_per_s": counter.total / 1e12 / seconds}
    return values


@contextmanager
def attention(mask: Mask, backend: Backend = "default") -> Iterator[None]:
    """All attention inside uses this mask and this backend of torch.

    With a backend that cannot compute what is asked of it, torch raises.
    """
    built_in = functional.scaled_dot_product_attention

    def masked(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        if mask == "none":
            attn_mask = None
        elif mask == "all true" and attn_mask is None:
            attn_mask = torch.ones(query.shape[0], 1, 1, key.shape[-2], dtype=torch.bool, device=query.device)
        out: Tensor = built_in(query, key, value, attn_mask, *rest, **more)
        return out

    if mask != "as built":
        functional.scaled_dot_product_attention = masked  # type: ignore[assignment]
    try:
        with nullcontext() if backend == "default" else sdpa_kernel(BACKENDS[backend]):
            yield
    finally:
        functional.scaled_dot_product_attention = built_in  # type: ignore[assignment]


def backends(device: torch.device) -> tuple[Backend, ...]:
    """Backends of attention without a mask that are to be compared on a device."""
    return ("flash", "cudnn") if device.type == "cuda" else ("math",)


def setup_of(record: Record) -> Setup:
    """Sizes of HunyuanVideo's networks and clips."""
    return TINY if record.small else CLIP


@torch.no_grad()
def spread(network: nn.Module) -> None:
    """Draws all weights anew so that every layer keeps the scale of its input.

    diffusers starts gates and output at small values, where a network hardly depends on its blocks.
    """
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)


def generator_of(family: Generator, device: torch.device) -> nn.Module:
    """A transformer with random weights of that kind, frozen."""
    transformer = build_generator(family, device)
    spread(transformer)
    return transformer


def compiler(device: torch.device) -> str:
    """The compiler of blocks; without a GPU one that only shows that they can be traced: compiling takes a minute."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def matrix_product(device: torch.device, *, small: bool) -> Values:
    """A large product of bfloat16 matrices: the ceiling of all that follows."""
    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(5):
            a @ b

    return timed(products, device, repeats=5)

"""What guided_step.py measures with: time and memory of a step on the device, arithmetic of whatever runs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

GIB = 2**30
Step = Callable[[], tuple[Tensor, Tensor | None]]
Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of taking a step.

    Attributes:
        name: of the way.
        median_ms: median time of a step.
        fastest_ms: the fastest.
        slowest_ms: the slowest.
        peak_gib: largest allocated memory on the generator's GPU in GiB; None without a GPU.
        peak_second_gib: the same of the second GPU, where there is one in use.
        overhead: ``median_ms`` over that of the unguided step, less one.
        gradient_norm: length of the reward gradient; None without guidance.
        gradient_finite: whether all of it is finite; None without guidance.
        difference: largest deviation of the next state from the sequential row's; None where that is undefined.
    """

    name: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    peak_gib: float | None
    peak_second_gib: float | None
    overhead: float
    gradient_norm: float | None = None
    gradient_finite: bool | None = None
    difference: float | None = None


class Stopwatch:
    """Times steps and watches memory on the devices that take part."""

    def __init__(self, devices: list[torch.device], warmup: int, repeats: int) -> None:
        self.devices = devices
        self.warmup = warmup
        self.repeats = repeats

    def _synchronize(self) -> None:
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _once(self, work: Work) -> float:
        """Milliseconds of one call; nothing else is under way."""
        if self.devices[0].type != "cuda":
            began = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.devices[0])
        start.record(stream)
        work()
        end.record(stream)
        self._synchronize()
        return float(start.elapsed_time(end))

    def times(self, work: Work) -> list[float]:
        """Milliseconds of each timed call, after the warm-up; :meth:`peaks` count from the first timed call."""
        gc.collect()
        if self.devices[0].type == "cuda":
            torch.cuda.empty_cache()
        for _ in range(self.warmup):
            work()
        self._synchronize()
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        return [self._once(work) for _ in range(self.repeats)]

    def peaks(self) -> list[float | None]:
        """Largest allocated memory on each device in GiB; None without a GPU."""
        return [
            torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None for device in self.devices
        ]

    @torch.no_grad()
    def measure(self, name: str, step: Step, unguided: Row | None, sequential: Tensor | None) -> tuple[Row, Tensor]:
        """The row of a way of stepping, and its next state on the CPU."""
        times, peaks = self.times(step), self.peaks()
        following, gradient = step()
        after = following.cpu()
        median = statistics.median(times)
        row = Row(
            name=name, median_ms=median, fastest_ms=min(times), slowest_ms=max(times),
            peak_gib=peaks[0], peak_second_gib=peaks[1] if len(peaks) > 1 else None,
            overhead=median / unguided.median_ms - 1 if unguided else 0.0,
            gradient_norm=None if gradient is None else float(gradient.norm()),
            gradient_finite=None if gradient is None else bool(torch.isfinite(gradient).all()),
            difference=None if sequential is None else float((after - sequential).abs().max()),
        )  # fmt: skip
        return row, after


class FlopCount(TorchDispatchMode):
    """Adds up the operations of everything that runs inside, backward passes too.

    torch's ``FlopCounterMode`` tracks modules with hooks that ``torch.autograd.grad`` refuses.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

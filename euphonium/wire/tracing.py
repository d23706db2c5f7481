"""Traces of what a process does, by torch's profiler, in the iterations that the recipe names.

The run loop opens a folder for such an iteration (:func:`tracing`). Every process of every role then traces its next
unit of work into it, once: a rollout actor a group, a rank of the learner a micro-batch forward and backward, a reward
server a pass. Whole iterations would be files of gigabytes, and one unit is like the next. Traces open in Perfetto
(ui.perfetto.dev) or ``chrome://tracing``; on a GPU a snapshot of its memory lies beside them (pytorch.org/memory_viz).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from euphonium.config import RunConfig

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
# In the folder of an iteration while it is under way.
OPEN = "open"
# Allocations that a snapshot of the GPU's memory goes back to.
REMEMBERED = 100_000


def folder_of(config: RunConfig, iteration: int) -> Path:
    """Where the traces of an iteration (from 1) are."""
    return config.run_dir / "traces" / f"iteration_{iteration:06d}"


@contextmanager
def tracing(config: RunConfig, iteration: int) -> Iterator[None]:
    """While open, all processes trace a unit of their work, if the recipe names this iteration (from 1)."""
    if iteration not in config.profile.iterations:
        yield
        return
    marker = folder_of(config, iteration) / OPEN
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


class Tracer:
    """Traces the work of one process.

    Args:
        config: configuration of the run.
        member: name of the process, which its files begin with.
    """

    def __init__(self, config: RunConfig, member: str) -> None:
        self._member = member
        self._left = {iteration: folder_of(config, iteration) for iteration in config.profile.iterations}

    def around(self, work: Callable[_P, _T]) -> Callable[_P, _T]:
        """The same work, each call of which is a unit."""

        def traced(*arguments: _P.args, **named: _P.kwargs) -> _T:
            with self.unit():
                return work(*arguments, **named)

        return traced

    @contextmanager
    def unit(self) -> Iterator[None]:
        """A unit of work, which is traced if an iteration is under way of which this process has traced none."""
        iteration = next((number for number, folder in self._left.items() if (folder / OPEN).exists()), None)
        if iteration is None:
            yield
            return
        folder = self._left.pop(iteration)
        with _memory(folder / f"{self._member}.memory.pickle"):
            with torch.profiler.profile(activities=_activities(), record_shapes=True, with_flops=True) as profile:
                yield
            with _written(folder):
                profile.export_chrome_trace(str(folder / f"{self._member}.json.gz"))


def _activities() -> list[torch.profiler.ProfilerActivity]:
    on_gpu = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_initialized() else []
    return [torch.profiler.ProfilerActivity.CPU, *on_gpu]


@contextmanager
def _memory(file: Path) -> Iterator[None]:
    """While open, allocations on the GPU are remembered, for a snapshot at the end; nothing on the CPU."""
    if not torch.cuda.is_initialized():
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=REMEMBERED)
    try:
        yield
        with _written(file.parent):
            torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """A trace that cannot be written ends no run."""
    try:
        yield
    except OSError as error:
        log.warning("a trace was not written to %s: %s", folder, error)

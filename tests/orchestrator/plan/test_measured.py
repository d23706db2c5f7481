"""Planned memory against what the allocator of the CPU gave out for the same computation on real tensors."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from orchestrator.plan.meter import Cost
from orchestrator.plan.passes import Passes
from tests.orchestrator.plan.models import MEDIUM, medium

MIB = 1 << 20
# The planned peak may be this far from the measured one.
TOLERANCE = 0.10


def allocated(run: Callable[[], object], resident: Iterable[Tensor]) -> Cost:
    """Measures a computation by every allocation and release that PyTorch's allocator reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return Cost(max(itertools.accumulate(changes)), 0, 0)


@pytest.mark.parametrize("name", MEDIUM)
@pytest.mark.parametrize("step", ["velocity", "micro_step", "score", "gradient", "decode"])
def test_the_planned_peak_is_the_measured_one(name: str, step: str, tmp_path: Path) -> None:
    config = medium(name, tmp_path / "model")
    samples = 4 if step in ("velocity", "score") else 2
    cost = getattr(Passes(config, prm_blocks=4), step)(samples)
    planned = cost.peak_bytes + cost.workspace_bytes
    measured = getattr(Passes(config, 4, torch.device("cpu"), allocated), step)(samples).peak_bytes
    assert measured > 5 * MIB
    assert planned == pytest.approx(measured, rel=TOLERANCE), f"{planned / MIB:.1f} of {measured / MIB:.1f} MiB"

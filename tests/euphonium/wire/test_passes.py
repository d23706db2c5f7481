"""Passes shrink when the device's memory is short, and a failed one keeps nothing alive."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from euphonium.wire.passes import Passes


def limited(fits: int, sizes: list[int]) -> object:
    """Work that runs out of memory with more than ``fits`` samples in a pass; notes the passes that went well."""

    def compute(part: slice) -> list[int]:
        size = part.stop - part.start
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(size)
        return list(range(part.start, part.stop))

    return compute


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 20))
def test_every_sample_is_computed_once_in_order(total: int, size: int, fits: int) -> None:
    sizes: list[int] = []
    passes = Passes(size, "rollout.samples_per_pass")
    results = passes.run(total, limited(fits, sizes))  # type: ignore[arg-type]
    assert [i for part in results for i in part] == list(range(total))
    assert max(sizes, default=0) <= min(size, fits)
    assert not total or passes.size <= max(1, size)


def test_a_smaller_size_is_for_good(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []
    passes = Passes(16, "rollout.samples_per_pass")
    passes.run(16, limited(4, sizes))  # type: ignore[arg-type]
    passes.run(16, limited(16, sizes))  # type: ignore[arg-type]
    assert sizes == [4] * 8
    assert "from here on 4 (set rollout.samples_per_pass to 4 or less)" in caplog.text


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Passes(4, "rollout.samples_per_pass").run(3, limited(0, []))  # type: ignore[arg-type]


def test_the_failed_pass_is_gone_before_the_next_begins() -> None:
    """An exception's traceback holds the frames, and with them the activations, of the pass that failed."""
    activations: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def compute(part: slice) -> int:
        alive.extend(activation() is not None for activation in activations)
        activation = torch.zeros(part.stop - part.start)
        activations.append(weakref.ref(activation))
        if len(activation) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1

    assert Passes(4, "rollout.samples_per_pass").run(2, compute) == [1, 1]
    assert alive
    assert not any(alive)

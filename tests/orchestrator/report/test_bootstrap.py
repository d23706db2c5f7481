"""Intervals of grouped values."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.report.bootstrap import grouped_interval


def test_intervals_are_as_wide_as_theory_says() -> None:
    drawn = np.random.default_rng(0)
    values = drawn.normal(0.3, 1.0, 400)
    found = grouped_interval(values.tolist(), list(range(400)))
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_copies_within_a_group_add_no_knowledge() -> None:
    values = np.random.default_rng(1).normal(size=30)
    once = grouped_interval(values.tolist(), list(range(30)))
    copied = grouped_interval(values.repeat(10).tolist(), np.arange(30).repeat(10).tolist())
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    apart = grouped_interval(values.repeat(10).tolist(), list(range(300)))
    assert apart.high - apart.low < 0.5 * (copied.high - copied.low)


def test_one_group_tells_nothing_of_others() -> None:
    found = grouped_interval([1.0, 3.0], ["a", "a"])
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)
    assert str(found) == "2.0000 [2.0000, 2.0000]"

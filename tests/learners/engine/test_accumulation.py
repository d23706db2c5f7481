"""The gradients of an update's micro-batches add up in float32."""

from pathlib import Path

from tests.ranks import run_ranks


def test_a_bfloat16_update_loses_no_micro_batch() -> None:
    """In bfloat16, 256 + 1 is 256: a sum of ones would stand still there."""
    worker = Path(__file__).with_name("accumulation_worker.py")
    assert "norm 600.0" in run_ranks(1, worker, 600, timeout_s=120)

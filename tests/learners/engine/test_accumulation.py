"""The gradients of an update's micro-batches add up in float32."""

import subprocess
import sys
from pathlib import Path

from tests.checkout import environment


def test_a_bfloat16_update_loses_no_micro_batch() -> None:
    """In bfloat16, 256 + 1 is 256: a sum of ones would stand still there."""
    worker = Path(__file__).with_name("accumulation_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    result = subprocess.run(
        [*command, "--rdzv-endpoint=127.0.0.1:0", str(worker), "600"],
        capture_output=True, text=True, check=False, timeout=120, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "norm 600.0" in result.stdout

"""Runs the benchmark's tiny configuration as a user would, on a machine without a GPU and without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
# A module that is None cannot be imported: the benchmark needs neither of them.
RUN = """
import runpy, sys
sys.modules["ray"] = sys.modules["deepspeed"] = None
sys.argv = ["guided_step.py", "--tiny", "--repeats", "3", "--warmup", "1", "--json", sys.argv[1]]
runpy.run_path("benchmarks/guided_step.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result as JSON, and what was printed."""
    file = tmp_path_factory.mktemp("guided_step") / "result.json"
    # A program's own folder is on its path, which run_path does not see to.
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text()), done.stdout


def test_rows_have_times_and_the_guided_ones_a_gradient(outcome: tuple[dict[str, Any], str]) -> None:
    result, _ = outcome
    assert result["tiny"] is True
    assert result["device"] == "cpu"
    assert [row["name"] for row in result["rows"]] == ["unguided", "sequential", "recomputed"]
    for row in result["rows"]:
        assert 0 < row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
        # Peaks are figures of GPUs; a number here would be made up.
        assert row["peak_gib"] is None
        assert row["peak_second_gib"] is None
    unguided, sequential, recomputed = result["rows"]
    assert unguided["gradient_finite"] is None
    for row in (sequential, recomputed):
        assert row["gradient_finite"] is True
        assert row["gradient_norm"] > 0
        assert row["overhead"] == pytest.approx(row["median_ms"] / unguided["median_ms"] - 1)
    # Recomputing activations changes nothing in the result.
    assert recomputed["difference"] == 0


def test_arithmetic_at_full_size_is_counted_without_a_gpu(outcome: tuple[dict[str, Any], str]) -> None:
    """Against a count by hand of the matrix products of HunyuanVideo's blocks, at width 3072."""
    result, _ = outcome
    width, image, text = 3072, 9 * 30 * 30, 256
    tokens = image + text
    attention = 4 * tokens**2 * width
    # 12 width^2 weights a token in a dual block (4 in projections, 8 in the MLP) and in a single one (3 + 4 + 5).
    block = 2 * tokens * 12 * width**2 + attention
    counted = result["tflop"]["full size"]
    assert counted["velocity"] == pytest.approx(60 * block / 1e12, rel=0.01)
    # To the state alone, the backward pass repeats each product with a weight once and each of attention's twice.
    forward_and_backward = 8 * (2 * 2 * tokens * 12 * width**2 + 3 * attention)
    assert counted["gradient"] == pytest.approx(forward_and_backward / 1e12, rel=0.02)
    assert counted["overhead"] == pytest.approx(counted["gradient"] / counted["velocity"])
    this = result["tflop"]["this run"]
    assert 0 < this["gradient"] < this["velocity"] < 1e-3


def test_the_paper_s_figures_and_the_table_are_reported(outcome: tuple[dict[str, Any], str]) -> None:
    result, printed = outcome
    assert result["paper"]["unguided"] == {"median_ms": 1005.6, "peak_gb": 32.9}
    assert result["paper"]["sequential"] == {"median_ms": 1030.1, "peak_gb": 35.7}
    assert result["latent_shape"] == [16, 3, 8, 8]
    for row in result["rows"]:
        assert f"{row['name']:<12}{row['median_ms']:>10.1f}" in printed
    assert "full size: velocity 165 TFLOP" in printed

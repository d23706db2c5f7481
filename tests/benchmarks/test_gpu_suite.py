"""Runs every part of the GPU's benchmark in tiny sizes on the CPU, as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_suite import run_part
from gpu_suite_tools import Record, Values

ROOT = Path(__file__).parent.parent.parent
# Each measurement's name, and what it must have found.
EXPECTED = {
    "velocity": {"velocity, batch 1, mask none": "tflop", "guided step, sequential, mask none": "overhead"},
    "ratio": {"rollout mask none (math), batch 4; learner mask none (math), batch 4": "ratio_max"},
    "learner": {"all weights, 2 rows, mask none": "seconds", "adapter, 2 rows, mask none": "seconds"},
    "vae": {"decode, 1 clip, tiling": "seconds", "decode, 2 clips": "seconds"},
    "training": {"one process, float32": "ratio_deviation", "Ray, float32": "ratio_deviation"},
    "publication": {"GPU to pinned memory": "gib_per_s", "broadcast between two processes": "gib_per_s"},
    "attention15": {"velocity without mask": "seconds", "what the mask changes": "relative_difference"},
    "compiled": {"velocity, compiled, first call": "relative_difference"},
    "families": {"embedded/euphonium.yaml, micro_step": "planned_tflop"},
    "reuse": {"velocity with the cache, first block alone": "seconds"},
    "prompt_lengths": {"5 tokens": "second_s"},
    "gradient_kernels": {"kernels, batch 2": "took_s"},
}


def suite(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The result as JSON, and what was printed."""
    file = folder / "result.json"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--small", "--out", str(file), *arguments], cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text()), done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("part", EXPECTED)
def test_part_measures_what_it_is_for(part: str, tmp_path: Path) -> None:
    result, printed = suite(tmp_path, "--only", part)
    found = result["parts"][part]
    assert found["status"] == "done", found
    rows = {row["name"]: row for row in found["rows"]}
    assert not [row for row in found["rows"] if "error" in row]
    for name, value in EXPECTED[part].items():
        assert rows[name][value] >= 0
        assert name in printed
    assert result["environment"]["versions"]["torch"]


def test_same_pass_has_ratios_of_exactly_one(tmp_path: Path) -> None:
    """The pass that drew the transitions, once more with gradients and checkpoints; others differ in bfloat16."""
    result, _ = suite(tmp_path, "--only", "ratio")
    rows = {row["name"]: row for row in result["parts"]["ratio"]["rows"]}
    kernel = "mask none (math)"
    same, alone = (rows[f"rollout {kernel}, batch 4; learner {kernel}, batch {batch}"] for batch in (4, 1))
    assert same["rows"] == alone["rows"] == 16
    assert same["ratio_max"] == same["velocity_error"] == 0
    assert 0 < alone["ratio_mean"] <= alone["ratio_max"] < 0.01
    assert 0 < alone["velocity_error"] < 0.05


def test_part_that_runs_out_of_time_is_ended() -> None:
    part = run_part("vae", 0.5, small=True)
    assert part["status"] == "stopped after its time"
    assert part["rows"] == []
    assert 0.5 <= part["seconds"] < 30


def test_parts_without_time_are_left_out(tmp_path: Path) -> None:
    result, printed = suite(tmp_path, "--minutes", "0.1")
    assert {part["status"] for part in result["parts"].values()} == {"left out: no time"}
    assert "compiled: left out: no time" in printed


def test_failed_measurement_is_on_record_and_the_part_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows.json", 0.0, small=True)

    def broken() -> Values:
        raise RuntimeError("out of memory")

    assert record.measure("first", broken) is None
    assert record.measure("second", lambda: {"seconds": 1.0})
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert first["error"].endswith("RuntimeError: out of memory")
    assert second["seconds"] == 1.0


def test_unknown_part_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--only", "vea"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "vea: parts are velocity, ratio" in done.stderr

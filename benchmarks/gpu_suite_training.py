"""Part ``training`` of gpu_suite.py: iterations of the embedded generator's recipe, in one process and through Ray."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_suite_tools import Record, Values
from single_process import SingleProcess

from euphonium.config import load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/embedded/euphonium.yaml"
ITERATIONS = 3
# One run through Ray: start, all iterations, end.
RAY_LIMIT_S = 150.0
# Longest that a run takes to end when it is told to.
STOP_S = 20.0
SMALL = (
    "rollout.prompts_per_iteration=2", "rollout.group_size=4", "objective.updates_per_iteration=2",
    "evaluation.prompts=2",
)  # fmt: skip
# A learner takes a whole GPU or none; with one GPU the other roles then have none.
PLACEMENTS = {
    "Ray, learner on the GPU": ("pools.learner.num_gpus=1", "pools.learner.num_workers=1"),
    # Two rollout actors.
    "Ray, other roles on the GPU": (
        "pools.rollout.num_gpus=0.2", "pools.prm.num_gpus=0.2", "pools.orm.num_gpus=0.2",
    ),
}  # fmt: skip


def training(record: Record) -> None:
    """Seconds an iteration, and whether ratios are 1 and rewards finite."""
    gpu = record.device.type == "cuda"
    for dtype in ("float32", "bfloat16"):
        record.measure(f"one process, {dtype}", lambda d=dtype: one_process(record, d))
    missing = [name for name in ("ray", "deepspeed") if importlib.util.find_spec(name) is None]
    cases = {
        f"{name}, {dtype}": (*placed, f"model.dtype={dtype}")
        for dtype in ("bfloat16", "float32")
        for name, placed in (PLACEMENTS if gpu else {"Ray": ()}).items()
    }
    if not gpu:
        cases = {name: placed for name, placed in cases.items() if name.endswith("float32")}
    for name, placed in cases.items():
        if missing:
            record.skip(name, f"{' and '.join(missing)} cannot be imported")
        elif record.deadline - time.time() < RAY_LIMIT_S / 3 + STOP_S:
            record.skip(name, "too little of the part's time is left")
        else:
            record.measure(name, lambda p=placed: through_ray(record, p))


def _overrides(record: Record) -> list[str]:
    iterations = 2 if record.small else ITERATIONS
    return [
        f"iterations={iterations}",
        f"evaluation.every={iterations}",
        "evaluation.prompts=8",
        *(SMALL if record.small else ()),
    ]


def one_process(record: Record, dtype: str) -> Values:
    """Iterations without Ray and DeepSpeed."""
    config = load_config(ROOT / RECIPE, [*_overrides(record), f"model.dtype={dtype}"])
    run = SingleProcess(config, record.device)
    seconds, records = [], []
    for _ in range(config.iterations):
        began = time.perf_counter()
        records.append(run.iterate())
        seconds.append(time.perf_counter() - began)
    return _summary(seconds, records)


def through_ray(record: Record, overrides: tuple[str, ...]) -> Values:
    """A whole run through the command line."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*_overrides(record), f"output_dir={folder}", "name=suite", "checkpoint.every=1000", *overrides]
        limit = min(RAY_LIMIT_S, record.deadline - time.time() - STOP_S)
        began = time.perf_counter()
        _run([sys.executable, "-m", "orchestrator", "train", RECIPE, *settings], limit)
        whole = time.perf_counter() - began
        lines = (Path(folder) / "suite" / "metrics.jsonl").read_text().splitlines()
    records = [entry for entry in map(json.loads, lines) if "policy/ratio_deviation" in entry]
    return _summary([entry["time/iteration_s"] for entry in records], records) | {"whole_run_s": whole}


def _run(command: list[str], limit_s: float) -> None:
    """Runs a command; its last lines are the error if it fails or takes too long.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        code: int | str = process.returncode
    except subprocess.TimeoutExpired:
        # As with Ctrl-C, so that the cluster ends too.
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=STOP_S - 5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        code = f"stopped after {limit_s:.0f} s"
    if code != 0:
        raise RuntimeError(f"{' '.join(command[1:4])}: {code}\n" + "\n".join(output.strip().splitlines()[-8:]))


def _summary(seconds: list[float], records: list[Mapping[str, float]]) -> Values:
    rewards = [value for entry in records for name, value in entry.items() if name.startswith("reward/")]
    values: Values = {
        "iterations": len(seconds), "first_s": seconds[0], "seconds": statistics.median(seconds[1:] or seconds),
        "ratio_deviation": max(entry["policy/ratio_deviation"] for entry in records),
        "clip_fraction": max(entry["policy/clip_fraction"] for entry in records),
        "rewards_finite": bool(rewards) and all(math.isfinite(value) for value in rewards),
    }  # fmt: skip
    for part in ("rollout", "update", "publish"):
        if f"time/{part}_s" in records[-1]:
            values[f"{part}_s"] = records[-1][f"time/{part}_s"]
    return values

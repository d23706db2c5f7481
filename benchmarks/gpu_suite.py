"""All checks that need a GPU in one command, in the order of their worth, within a number of minutes.

    python benchmarks/gpu_suite.py --minutes 10 --out result.json
    python benchmarks/gpu_suite.py --only velocity,learner --out result.json
    python benchmarks/gpu_suite.py --small --out result.json       # tiny sizes on the CPU: checks that all parts run

Every part is a process of its own with a limit of its own, so that one that runs out of memory or time takes nothing
from the others; what it had measured by then is kept. The result is written anew after each part. At full size weights
are random and are made on the GPU; nothing is downloaded. Parts:

    velocity      HunyuanVideo's velocity with and without attention mask, guidance by a process reward model.
    learner       the learner's micro-step with gradient checkpointing: time and memory.
    ratio         importance ratios in bfloat16: a batched rollout pass against the learner's.
    vae           decoding of clips.
    training      the embedded generator's recipe on the GPU, in one process, and through Ray and DeepSpeed.
    publication   copies of all weights on the GPU, by way of the CPU, and between two GPUs.
    attention15   blocks of HunyuanVideo-1.5 with and without the mask that its attention makes.
    compiled      the velocity with compiled blocks.
    gradient      the process reward's gradient by batch.
    compiled_learner  the learner's micro-step with compiled blocks.
    families      velocity and micro-step of the other families at their published sizes, beside their plans.
    reuse         a pass with the first-block cache: with all blocks, and with the first alone.
    prompt_lengths  compiled blocks with prompts of several lengths.
    gradient_kernels  where the process reward's gradient spends its time, for one state and for two.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
# Module and limit in seconds of each part, by worth.
PARTS: dict[str, tuple[str, float]] = {
    "velocity": ("gpu_suite_generator", 130),
    "ratio": ("gpu_suite_learner", 150),
    "learner": ("gpu_suite_learner", 130),
    "vae": ("gpu_suite_parts", 90),
    "training": ("gpu_suite_training", 200),
    "publication": ("gpu_suite_publication", 75),
    "attention15": ("gpu_suite_parts", 75),
    "compiled": ("gpu_suite_generator", 150),
    "gradient": ("gpu_suite_generator", 60),
    "compiled_learner": ("gpu_suite_learner", 120),
    "families": ("gpu_suite_families", 240),
    "reuse": ("gpu_suite_families", 60),
    "prompt_lengths": ("gpu_suite_families", 150),
    "gradient_kernels": ("gpu_suite_families", 60),
}
# Time that a part needs at least to measure anything.
LEAST_S = 15.0
PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "deepspeed", "triton", "numpy")


def environment(commit: str | None) -> dict[str, Any]:
    """What the results depend on: machine, versions, command."""

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or output("git", "describe", "--always", "--dirty"),
        "command": " ".join(sys.argv),
        "gpu": output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def run_part(name: str, limit_s: float, *, small: bool) -> dict[str, Any]:
    """Runs a part in a process of its own, and ends it after its time."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--part", name, "--rows", str(rows), "--limit", str(limit_s)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, *(["--small"] if small else [])], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
            try:
                status = f"exit code {process.wait(limit_s)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = "stopped after its time"
        found = {
            "status": "done" if status == "exit code 0" else status,
            "seconds": round(time.monotonic() - began, 1),
            "rows": json.loads(rows.read_text()) if rows.exists() else [],
        }
        if found["status"] != "done":
            found["log"] = log.read_text(errors="replace").splitlines()[-15:]
    return found


def measure(name: str, rows: Path, limit_s: float, *, small: bool) -> None:
    """What the process of a part does."""
    from gpu_suite_tools import Record

    module = importlib.import_module(PARTS[name][0])
    getattr(module, name)(Record(rows, time.time() + limit_s, small=small))


def text_of(name: str, part: dict[str, Any]) -> str:
    """A part's rows as lines of text."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [f"{name}: {part['status']}, {part['seconds']} s"]
    for row in part["rows"]:
        values = {key: value for key, value in row.items() if key not in ("name", "took_s") and value is not None}
        if "error" in values:
            values["error"] = values["error"].splitlines()[-1]
        lines.append(f"  {row['name']:<58} " + "  ".join(f"{key} {cell(value)}" for key, value in values.items()))
    return "\n".join(lines + [f"  | {line}" for line in part.get("log", [])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs all checks that need a GPU, or some of them.")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for everything; parts that do not fit are left out"
    )
    parser.add_argument("--only", help=f"parts, separated by commas, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite.json"), help="file for the results as JSON")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--commit", help="commit that is measured, where git cannot tell")
    for name in ("--part", "--rows", "--limit"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure(arguments.part, Path(arguments.rows), float(arguments.limit), small=arguments.small)
        return
    names = arguments.only.split(",") if arguments.only else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    ends = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"environment": environment(arguments.commit), "parts": {}}
    for name in names:
        left = ends - time.monotonic()
        if left < LEAST_S:
            part: dict[str, Any] = {"status": "left out: no time", "seconds": 0.0, "rows": []}
        else:
            part = run_part(name, min(PARTS[name][1], left), small=arguments.small)
        result["parts"][name] = part
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        print(text_of(name, part), flush=True)
    print(json.dumps(result["environment"]))


if __name__ == "__main__":
    main()

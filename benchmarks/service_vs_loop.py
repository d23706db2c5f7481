"""Groups per second of the service against the same work in one process, on this machine, as a ratio.

    python benchmarks/service_vs_loop.py recipes/embedded/euphonium.yaml --iterations 6 --rounds 2

Both draw the same groups from the same prompts with the same samplers, rewards and objective, and take turns, so that
whatever else the machine does hits both. The loop uses every core for each step in turn; the service's roles have the
threads that the recipe gives them. The first iteration of each round (loading, first calls) is left out, and so are
evaluations. On one machine without accelerators the service can at best hide what the loop does in turn; what it costs
is what this measures. Overrides after ``--`` hold for both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from core.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent


def loop(recipe: str, overrides: list[str], groups: int) -> float:
    command = [sys.executable, str(ROOT / "benchmarks" / "single_process.py"), recipe, *overrides]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    records = [json.loads(line) for line in output.splitlines()][2:]
    return groups * len(records) / sum(r["time/rollout_s"] + r["time/update_s"] for r in records)


def service(recipe: str, overrides: list[str], groups: int, folder: Path, name: str) -> float:
    names = [f"name={name}", f"output_dir={folder}", "metrics.prometheus_port=null", "evaluation.clips=0"]
    command = [sys.executable, "-m", "orchestrator", "train", recipe, *overrides, *names]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][2:]
    return groups * len(records) / sum(record["time/iteration_s"] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_intermixed_args()
    overrides = [*options.overrides, f"iterations={options.iterations}", "evaluation.every=1000000"]
    config: RunConfig = load_config(Path(options.recipe), overrides)
    groups = config.rollout.prompts_per_iteration
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            alone = loop(options.recipe, overrides, groups)
            ours = service(options.recipe, overrides, groups, Path(folder), f"round-{number}")
            row = {"round": number, "loop_groups_per_s": alone, "service_groups_per_s": ours, "ratio": ours / alone}
            print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()

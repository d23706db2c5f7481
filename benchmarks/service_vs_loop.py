"""Groups per second of the service against the same work in one process, on this machine, as a ratio.

    python benchmarks/service_vs_loop.py recipes/embedded/euphonium.yaml --iterations 6 --rounds 2

Both draw the same groups from the same prompts with the same samplers, rewards and objective, and take turns, so that
whatever else the machine does hits both. The loop uses every core for each step in turn; the service's roles have the
threads that the recipe gives them. The first iteration of each round (loading, first calls) is left out, and so are
evaluations. On one machine without accelerators the service can at best hide what the loop does in turn; what it costs
is what this measures. Overrides after ``--`` hold for both.

``--ceiling`` adds what the machine allows at all: as many loops of one thread each as there are cores, side by side,
which share nothing and wait for nothing; and the same beside an idle Ray cluster with as many actors as a run has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from euphonium.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent
# Of a small run: learner mailbox, weight store, control desk, a rollout actor, an ORM server, a learner rank, and the
# six that Ray Train adds to it.
ACTORS = 12


def loops(recipe: str, overrides: list[str], groups: int, count: int, threads: int | None) -> float:
    """Groups per second of loops that run side by side, all together."""
    command = [sys.executable, str(ROOT / "benchmarks" / "single_process.py"), recipe, *overrides]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) for _ in range(count)
    ]
    total = 0.0
    for process in started:
        output, _ = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        records = [json.loads(line) for line in output.splitlines()][2:]
        total += groups * len(records) / sum(r["time/rollout_s"] + r["time/update_s"] for r in records)
    return total


def service(recipe: str, overrides: list[str], groups: int, folder: Path, name: str) -> float:
    """Groups per second of the service."""
    names = [f"name={name}", f"output_dir={folder}", "metrics.prometheus_port=null", "evaluation.clips=0"]
    command = [sys.executable, "-m", "orchestrator", "train", recipe, *overrides, *names]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][2:]
    return groups * len(records) / sum(record["time/iteration_s"] for record in records)


@contextlib.contextmanager
def idle_cluster() -> Iterator[None]:
    """A Ray cluster on this machine with actors that nobody calls."""
    import ray

    class Idle:
        def ready(self) -> bool:
            return True

    ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR")
    try:
        actors: list[Any] = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(ACTORS)]
        ray.get([actor.ready.remote() for actor in actors])
        yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ceiling", action="store_true", help="measure what the machine allows at all, too")
    options = parser.parse_intermixed_args()
    overrides = [*options.overrides, f"iterations={options.iterations}", "evaluation.every=1000000"]
    config: RunConfig = load_config(Path(options.recipe), overrides)
    groups = config.rollout.prompts_per_iteration
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            alone = loops(options.recipe, overrides, groups, 1, None)
            ours = service(options.recipe, overrides, groups, Path(folder), f"round-{number}")
            row = {"round": number, "loop_groups_per_s": alone, "service_groups_per_s": ours, "ratio": ours / alone}
            if options.ceiling:
                row["ceiling_ratio"] = loops(options.recipe, overrides, groups, cores, 1) / alone
                with idle_cluster():
                    row["ceiling_ratio_beside_idle_ray"] = loops(options.recipe, overrides, groups, cores, 1) / alone
            print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()

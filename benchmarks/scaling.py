"""How the service itself scales: 1 to 32 rollout actors whose computation is a sleep, everything else real.

    python benchmarks/scaling.py --actors 1 2 4 8 16 32 --seconds 1.0

Actors, run loop, object store, buffer, weight publication and checkpoints are those of a real run; drawing a group
sleeps, an update sleeps. The work grows with the actors (two groups an actor and iteration), rollout runs ahead of the
update by one iteration. Efficiency is groups per second and actor against the run with one actor: what it loses is
what orchestration costs. The actors of one machine share its cores, so the sleep should be long against
``32 actors * cost of a call / cores``.

``control_cpu_ms_per_group`` is the CPU time of everything that a cluster has once (driver with its run loop, trajectory
buffer, weight store, control desk, GCS, raylet) over the groups: one core of the head feeds as many rollout actors as
one group takes of it fits into the time in which an actor draws one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import _checkout  # noqa: F401
import psutil
import ray

from orchestrator.lifecycle import execute
from orchestrator.run import Run
from tests.stubs import roles


def measure(folder: Path, actors: int, iterations: int, seconds: float, payload_mb: float) -> dict[str, float]:
    class Sleeping(roles.StubRun):
        rollout_s, update_s = seconds, seconds / 2
        # 8 samples, states and next states.
        values = max(roles.SIZE, int(payload_mb * 2**20 / 8 / 2 / 4))

    config = roles.stub_recipe(
        folder,
        f"scaling-{actors}",
        f"iterations={iterations}",
        f"rollout.prompts_per_iteration={2 * actors}",
        "rollout.group_size=8",
        "rollout.max_staleness=1",
        f"pools.rollout.num_actors={actors}",
    )
    run = Sleeping(config, "scaling", None)
    spent = spent_at_records(run)
    asyncio.run(execute(run))
    for name in ray.util.list_named_actors():
        ray.kill(ray.get_actor(name))
    records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    # The first iterations fill the pipeline, the last evaluates.
    steady = records[3:-1]
    groups = sum(record["rollout/groups"] for record in steady)
    span = sum(record["time/iteration_s"] for record in steady)
    busy = sum(record["busy/rollout"] for record in steady) / len(steady)
    # At the records before the first of them and of the last.
    control = 1000 * (spent[-2] - spent[2]) / groups
    return {
        "actors": actors, "groups_per_s": groups / span, "rollout_busy": busy, "control_cpu_ms_per_group": control,
    }  # fmt: skip


def spent_at_records(run: Run) -> list[float]:
    """A list that grows by the CPU time so far whenever the run puts an iteration on record."""
    spent: list[float] = []
    tracker = run.journal.tracker
    record = tracker.record

    def watched(values: Mapping[str, float]) -> None:
        spent.append(control_plane_seconds())
        record(values)

    tracker.record = watched  # type: ignore[method-assign]  # It is watched, not replaced.
    return spent


def control_plane_seconds() -> float:
    """CPU time so far of the processes that a cluster has once."""
    actors = (
        "LearnerMailbox", "WeightStore", "ControlDesk", "LoadBalancer", "learner-mailbox", "weight-store", "control",
        "load-balancer",
    )  # fmt: skip
    once = ("gcs_server", "raylet", *(f"ray::{title}" for title in actors))
    driver = psutil.Process()
    total = sum(driver.cpu_times()[:2])
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = (process.cmdline() or [""])[0].rpartition("/")[2]
            if title.startswith(once):
                total += sum(process.cpu_times()[:2])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="that drawing a group takes")
    parser.add_argument("--payload-mb", type=float, default=1.0, help="trajectories of a group")
    options = parser.parse_args()
    logging.getLogger("orchestrator").setLevel(logging.ERROR)
    ray.init(namespace="scaling", log_to_driver=False, logging_level="ERROR")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for actors in options.actors:
            row = measure(Path(folder), actors, options.iterations, options.seconds, options.payload_mb)
            each = row["groups_per_s"] / actors
            first = first or each
            row |= {"efficiency": each / first, "of_ideal": each * options.seconds}
            print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

"""A long run in which something is killed all the time: does it end, and with the numbers of a run left in peace?

    python benchmarks/soak.py --iterations 400 --every 1.5

Run loop, pools, buffer, weight store, reward calls and checkpoints are real, computation is not (tests/stubs/roles.py),
so that hundreds of kills fit into minutes. At random moments a random process gets SIGKILL: a rollout actor, a reward
server, the learner mailbox, the weight store, the control desk; now and then the learner dies in the middle of an
update. The same recipe runs once without any kill. In strict order (no staleness) both must agree on every iteration,
every reward and every weight to the last bit; a group that was lost, repeated or counted twice would show.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import psutil
import ray

from orchestrator.lifecycle import execute
from tests.stubs import roles

KEYS = ("iteration", "reward/icon/mean", "reward/motion/mean", "policy/loss", "advantage/std")
VICTIMS = ("rollout-0", "rollout-1", "rollout-2", "orm-0", "orm-1", "learner-mailbox", "weight-store", "control")


async def kill_at_random(run: Any, every_s: float, rng: random.Random, kills: Counter[str]) -> None:
    """Kills processes until the run ends."""
    while True:
        await asyncio.sleep(rng.expovariate(1 / every_s))
        name = rng.choice(VICTIMS)
        try:
            actor = ray.get_actor(name)
            pid = await asyncio.wait_for(actor.__ray_call__.remote(lambda self: __import__("os").getpid()), 5)
            psutil.Process(pid).kill()
        except (ValueError, TimeoutError, psutil.NoSuchProcess, ray.exceptions.RayError):
            # It is dead or busy: somebody else next time.
            continue
        kills[name.rstrip("-0123456789")] += 1


def run_once(folder: Path, name: str, options: argparse.Namespace, every_s: float | None) -> dict[str, Any]:
    rng = random.Random(options.seed)
    config = roles.stub_recipe(
        folder,
        name,
        f"iterations={options.iterations}",
        "rollout.prompts_per_iteration=6",
        "rewards.attempts=30",
        "checkpoint.every=5",
        "pools.rollout.num_actors=3",
        "pools.orm.num_actors=2",
        *(f"pools.{role}.max_restarts=1000000" for role in ("rollout", "orm")),
    )
    crashing = set(rng.sample(range(2, options.iterations), options.iterations // 20)) if every_s else set()
    kills: Counter[str] = Counter()

    class Soaked(roles.StubRun):
        rollout_s, update_s = 0.05, 0.05
        crashes = set(crashing)  # noqa: RUF012

    ray.init(address="local", num_cpus=4, namespace="soak", log_to_driver=False, include_dashboard=False,
             logging_level=logging.ERROR)  # fmt: skip
    began = time.monotonic()

    async def both() -> None:
        killer = asyncio.ensure_future(kill_at_random(run, every_s, rng, kills)) if every_s else None
        try:
            await execute(run)
        finally:
            if killer is not None:
                killer.cancel()

    try:
        run = Soaked(config, "soak", None)
        asyncio.run(both())
        restarts = run.learners.group.restarts
    finally:
        ray.shutdown()
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        "seconds": time.monotonic() - began,
        "chain": [tuple(record[key] for key in KEYS) for record in records[1:]],
        "dropped": sum(record.get("rollout/dropped_groups", 0) for record in records),
        "kills": dict(kills),
        "learner_restarts": restarts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--every", type=float, default=1.5, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        peaceful = run_once(Path(name), "peace", options, None)
        soaked = run_once(Path(name), "soak", options, options.every)
    report = {
        "iterations": options.iterations,
        "kills": sum(soaked["kills"].values()),
        "kills_by_role": soaked["kills"],
        "learner_restarts": soaked["learner_restarts"],
        "dropped_groups": soaked["dropped"],
        "iterations_done_once_each": [row[0] for row in soaked["chain"]] == list(range(1, options.iterations + 1)),
        "numbers_equal_to_the_last_bit": soaked["chain"] == peaceful["chain"],
        "seconds_in_peace": round(peaceful["seconds"], 1),
        "seconds_under_fire": round(soaked["seconds"], 1),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

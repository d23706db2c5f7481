"""What it saves that the learner begins with the first groups of an on-policy iteration while the others are drawn.

    python benchmarks/streaming.py --actors 4 --waves 8 --seconds 4
    python benchmarks/streaming.py --recipe recipes/embedded/euphonium-sage.yaml

Computation is a sleep, everything else is real: run loop, object store, mailbox, weights. Each actor draws as many
groups an iteration as there are waves; drawing all takes ``R`` seconds and the update ``L``, at ratios of 1:1, 1:2, 2:1
(R:L). With and without ``rollout.stream`` in turn; printed are the seconds of an iteration over those of the run that
waits. With waves of equal length, ``max(R + L / waves, R / waves + L) / (R + L)`` is possible.

With ``--recipe`` the roles are real: the iterations of the recipe with and without, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import _checkout  # noqa: F401
import ray

from orchestrator.lifecycle import execute
from tests.stubs import roles

ROOT = Path(__file__).parent.parent


def seconds_of(run_dir: Path) -> float:
    """Median seconds of the iterations after the first and before the last, which evaluates."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["time/iteration_s"] for record in records[2:-1])


def stubbed(
    folder: Path, options: argparse.Namespace, actors: int, times: tuple[float, float], *, stream: bool
) -> float:
    """Seconds of an iteration whose rollout and update sleep."""

    class Sleeping(roles.StubRun):
        rollout_s, update_s = times[0] / options.waves, times[1]

    config = roles.stub_recipe(
        folder, f"a{actors}-r{times[0]:g}-l{times[1]:g}-{stream}", f"iterations={options.iterations}",
        f"rollout.prompts_per_iteration={actors * options.waves}", f"pools.rollout.num_actors={actors}",
        f"rollout.stream={str(stream).lower()}", prompts=actors * options.waves,
    )  # fmt: skip
    asyncio.run(execute(Sleeping(config, "streaming", None)))
    for name in ray.util.list_named_actors():
        ray.kill(ray.get_actor(name))
    return seconds_of(config.run_dir)


def ideal(rollout: float, update: float, waves: int) -> float:
    """The possible ratio.

    >>> ideal(1.0, 1.0, 8)
    0.5625
    """
    return max(rollout + update / waves, rollout / waves + update) / (rollout + update)


def stubs(options: argparse.Namespace) -> None:
    """Prints a line for each number of actors and ratio."""
    logging.getLogger("orchestrator").setLevel(logging.ERROR)
    ray.init(namespace="streaming", log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        for actors in options.actors:
            for ratio in options.ratios:
                rollout, _, update = ratio.partition(":")
                times = (float(rollout) * options.seconds, float(update) * options.seconds)
                waiting, streamed = (
                    stubbed(Path(folder), options, actors, times, stream=stream) for stream in (False, True)
                )
                row = {
                    "actors": actors, "rollout_s": times[0], "update_s": times[1], "waiting_s": waiting,
                    "streamed_s": streamed, "ratio": streamed / waiting, "ideal": ideal(*times, options.waves),
                }  # fmt: skip
                print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
    ray.shutdown()


def real(options: argparse.Namespace) -> None:
    """Prints a line for each round of a recipe."""
    for number in range(options.rounds):
        found = {}
        for stream in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                overrides = [
                    *options.overrides, f"rollout.stream={str(stream).lower()}", f"iterations={options.iterations}",
                    f"output_dir={folder}", "name=streaming", "evaluation.every=1000000", "evaluation.clips=0",
                    "metrics.prometheus_port=null", "rollout.max_staleness=0",
                ]  # fmt: skip
                command = [sys.executable, "-m", "orchestrator", "train", options.recipe, *overrides]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
                found[stream] = seconds_of(Path(folder) / "streaming")
        row = {
            "round": number,
            "waiting_s": found[False],
            "streamed_s": found[True],
            "ratio": found[True] / found[False],
        }
        print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--recipe", help="measure this one with its real roles")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--waves", type=int, default=8, help="groups that an actor draws in an iteration")
    parser.add_argument("--ratios", nargs="+", default=["1:1", "1:2", "2:1"], help="of drawing to update")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the shorter part, drawing or update")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="of a recipe")
    options = parser.parse_intermixed_args()
    if options.recipe is not None:
        real(options)
    else:
        stubs(options)


if __name__ == "__main__":
    main()

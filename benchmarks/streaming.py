"""What it saves that the learner begins with the first groups of an on-policy iteration while the others are drawn.

    python benchmarks/streaming.py --actors 4 --waves 8 --seconds 4
    python benchmarks/streaming.py --recipe recipes/embedded/euphonium-sage.yaml
    python benchmarks/streaming.py --actors 4 --split-tail 6 --seconds 2

Computation is a sleep, everything else is real: run loop, object store, mailbox, weights. Each actor draws as many
groups an iteration as there are waves; drawing all takes ``R`` seconds and the update ``L``, at ratios of 1:1, 1:2, 2:1
(R:L). With and without ``rollout.stream`` in turn; printed are the seconds of an iteration over those of the run that
waits. With waves of equal length, ``max(R + L / waves, R / waves + L) / (R + L)`` is possible.

With ``--recipe`` the roles are real: the iterations of the recipe with and without, in turn.

With ``--split-tail`` it is ``rollout.split_tail`` that is compared, in iterations of so many groups: drawing one takes
``--seconds``, the update a tenth of that, and the ratio of the waves is possible.
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
from orchestrator.plan.tail import tail_of
from tests.stubs import roles

ROOT = Path(__file__).parent.parent


def seconds_of(run_dir: Path) -> float:
    """Median seconds of the iterations after the first and before the last, which evaluates."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["time/iteration_s"] for record in records[2:-1])


def stubbed(folder: Path, groups: int, actors: int, times: tuple[float, float], *overrides: str) -> float:
    """Seconds of an iteration, in which drawing a group sleeps and an update does."""

    class Sleeping(roles.StubRun):
        rollout_s, update_s = times

    name = "-".join(["stub", str(actors), *map(str, times), *overrides]).replace("=", "-")
    config = roles.stub_recipe(
        folder, name, "rollout.group_size=8",
        f"rollout.prompts_per_iteration={groups}", f"pools.rollout.num_actors={actors}", *overrides, prompts=groups,
    )  # fmt: skip
    asyncio.run(execute(Sleeping(config, "streaming", None)))
    for name in ray.util.list_named_actors():
        ray.kill(ray.get_actor(name))
    return seconds_of(config.run_dir)


def with_and_without(
    folder: Path, options: argparse.Namespace, field: str, groups: int, actors: int, times: tuple[float, float]
) -> tuple[float, float]:
    """Seconds of an iteration without what a field of ``rollout`` switches on, and with it."""
    iterations = f"iterations={options.iterations}"
    without, with_it = (
        stubbed(folder, groups, actors, times, iterations, f"rollout.{field}={value}") for value in ("false", "true")
    )
    return without, with_it


def print_row(**values: float) -> None:
    """Prints numbers by name."""
    print(json.dumps({name: round(value, 4) for name, value in values.items()}), flush=True)


def ideal(rollout: float, update: float, waves: int) -> float:
    """The possible ratio.

    >>> ideal(1.0, 1.0, 8)
    0.5625
    """
    return max(rollout + update / waves, rollout / waves + update) / (rollout + update)


def stubs(options: argparse.Namespace) -> None:
    """Prints a line for each number of actors, and each ratio or number of groups."""
    logging.getLogger("orchestrator").setLevel(logging.ERROR)
    ray.init(namespace="streaming", log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        for actors in options.actors:
            for groups in options.split_tail:
                split(Path(folder), options, groups, actors)
            for ratio in options.ratios if not options.split_tail else ():
                streamed_ratio(Path(folder), options, ratio, actors)
    ray.shutdown()


def streamed_ratio(folder: Path, options: argparse.Namespace, ratio: str, actors: int) -> None:
    """Prints what ``rollout.stream`` saves at a ratio of drawing to update."""
    rollout, update = (float(part) * options.seconds for part in ratio.split(":"))
    times = (rollout / options.waves, update)
    waiting, streamed = with_and_without(folder, options, "stream", actors * options.waves, actors, times)
    print_row(
        actors=actors, rollout_s=rollout, update_s=update, waiting_s=waiting, streamed_s=streamed,
        ratio=streamed / waiting, ideal=ideal(rollout, update, options.waves),
    )  # fmt: skip


def split(folder: Path, options: argparse.Namespace, groups: int, actors: int) -> None:
    """Prints what ``rollout.split_tail`` saves with so many groups an iteration."""
    times = (options.seconds, options.seconds / 10)
    whole, parted = with_and_without(folder, options, "split_tail", groups, actors, times)
    waves, shorter = (tail_of(groups, actors, 8, piece).waves for piece in (8, 1))
    print_row(
        actors=actors, groups=groups, waves=waves, split_waves=shorter, whole_s=whole, split_s=parted,
        ratio=parted / whole, ideal=shorter / waves,
    )  # fmt: skip


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
        print_row(round=number, waiting_s=found[False], streamed_s=found[True], ratio=found[True] / found[False])


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--recipe", help="measure this one with its real roles")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--waves", type=int, default=8, help="groups that an actor draws in an iteration")
    parser.add_argument("--ratios", nargs="+", default=["1:1", "1:2", "2:1"], help="of drawing to update")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the shorter part, drawing or update")
    parser.add_argument("--split-tail", type=int, nargs="+", default=[], metavar="GROUPS", help="of an iteration")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="of a recipe")
    options = parser.parse_intermixed_args()
    if options.recipe is not None:
        real(options)
    else:
        stubs(options)


if __name__ == "__main__":
    main()

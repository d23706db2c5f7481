"""What it saves to compute a state once that all samples of a group share.

    python benchmarks/equal_states.py recipes/embedded/euphonium-sage.yaml recipes/embedded/mixgrpo.yaml

One process, no cluster. Every recipe's rollout and update are timed twice in turn: as they are, and with initial noise
that differs by a part in ten million from sample to sample, so that nothing is shared and everything else is the same.
Also printed: how far the probabilities of rollout and learner are apart in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from single_process import SingleProcess
from torch import Tensor

import actors.rollout
from actors.sampler import initial_noise
from euphonium.config import RunConfig, load_config

# Relative to the noise; far below what a sampler can tell, and enough for float32 to be another number.
APART = 1e-6


def nearly_equal_noise(
    shape: tuple[int, ...], group_size: int, seed: int, *, shared: bool, device: torch.device
) -> tuple[Tensor, torch.Generator]:
    """Initial noise of which no two samples have exactly the same."""
    start, generator = initial_noise(shape, group_size, seed, shared=shared, device=device)
    factors = 1 + APART * torch.arange(group_size, device=device)
    return start * factors.view(-1, *[1] * len(shape)), generator


@contextmanager
def states_apart(apart: bool) -> Iterator[None]:
    """Rollouts within it start apart, or as they do."""
    with mock.patch.object(actors.rollout, "initial_noise", nearly_equal_noise if apart else initial_noise):
        yield


def measure(config: RunConfig, repeats: int) -> dict[str, float]:
    """Seconds of rollout and update with equal states once, over those with states apart, and ratios' deviations."""
    run = SingleProcess(config)
    seconds: dict[tuple[str, bool], list[float]] = {}
    deviation = {True: 0.0, False: 0.0}
    for repeat in range(2 * (repeats + 1)):
        apart = repeat % 2 == 1
        with states_apart(apart):
            metrics = run.iterate()
        deviation[apart] = max(deviation[apart], metrics["policy/ratio_deviation"])
        if repeat > 1:
            for part in ("rollout", "update"):
                seconds.setdefault((part, apart), []).append(metrics[f"time/{part}_s"])
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    result = {part: medians[part, False] / medians[part, True] for part in ("rollout", "update")}
    whole = [sum(medians[part, apart] for part in ("rollout", "update")) for apart in (False, True)]
    return result | {
        "iteration": whole[0] / whole[1],
        "deviation": deviation[False],
        "deviation_apart": deviation[True],
    }


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipes of the embedded generator; KEY=VALUE arguments change all")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a recipe")
    arguments = parser.parse_intermixed_args()
    overrides = [a for a in arguments.recipes if "=" in a]
    for recipe in (a for a in arguments.recipes if "=" not in a):
        found = measure(load_config(recipe, overrides), arguments.repeats)
        if arguments.json:
            print(json.dumps({"recipe": recipe} | found), flush=True)
        else:
            print(
                f"{recipe}: rollout {found['rollout']:.2f}, update {found['update']:.2f}, iteration "
                f"{found['iteration']:.2f} of the time; |ratio - 1| {found['deviation']:.1e} "
                f"(apart {found['deviation_apart']:.1e})",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""What reusing the output of a transformer's blocks between steps without noise saves, and what it does to the samples.

    python benchmarks/feature_reuse.py recipes/embedded/euphonium-sage.yaml evaluation.num_steps=20

One process, no cluster. The evaluation's samples are drawn by every step's full computation and with the first-block
cache at several thresholds, in turn, from the same noise. Printed for each threshold: the share of passes that reused
something, time over that of the exact passes, distance of the samples from the exact ones relative to their spread, and
the change of every outcome reward with the standard error of the paired differences.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig, load_config
from euphonium.wire.records import Array
from orchestrator.evaluation import evaluation_set
from reward_servers.orm import OrmScorer

CPU = torch.device("cpu")


def drawn(worker: RolloutWorker, prompts: list[str], seeds: list[int]) -> tuple[float, Array]:
    """Seconds, and the samples."""
    began = time.perf_counter()
    latents = worker.evaluate(prompts, seeds)
    return time.perf_counter() - began, latents


def compare(config: RunConfig, thresholds: list[float], repeats: int) -> None:
    """Prints a line a threshold."""
    prompts, seeds = evaluation_set(config)
    exact = RolloutWorker(config, CPU)
    scorer = OrmScorer(config.rewards.outcome, exact.family, CPU, config.pools.orm)
    _, reference = drawn(exact, prompts, seeds)
    scores = scorer.score(reference, prompts)
    names = [reward.name for reward in config.rewards.outcome]
    print(f"{len(prompts)} samples of {config.evaluation.num_steps} steps")
    print("  ".join(["threshold", "reused", "time", "distance", *(f"{name:>16}" for name in names)]))
    for threshold in thresholds:
        setting = config.evaluation.model_copy(update={"reuse_below": threshold})
        cheap = RolloutWorker(config.model_copy(update={"evaluation": setting}), CPU)
        assert cheap.cache is not None
        seconds: list[tuple[float, float]] = []
        for _ in range(repeats):
            reused_s, latents = drawn(cheap, prompts, seeds)
            exact_s, _ = drawn(exact, prompts, seeds)
            seconds.append((reused_s, exact_s))
        ratio = np.median([reused_s / exact_s for reused_s, exact_s in seconds])
        distance = np.sqrt(np.mean((latents - reference) ** 2)) / reference.std()
        changes = []
        for name, after in scorer.score(latents, prompts).items():
            difference = after - scores[name]
            changes.append(f"{difference.mean():+.4f} ± {difference.std(ddof=1) / len(prompts) ** 0.5:.4f}")
        share = cheap.cache.reused / cheap.cache.passes
        print("  ".join([f"{threshold:9}", f"{share:6.2f}", f"{ratio:4.2f}", f"{distance:8.3f}", *changes]), flush=True)


def main() -> None:
    """Measures a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare(load_config(arguments.recipe, arguments.overrides), arguments.thresholds, arguments.repeats)


if __name__ == "__main__":
    main()

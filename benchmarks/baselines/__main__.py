"""Samples a second of the service against the loops of published trainers, on the same recipe, as ratios.

    python -m benchmarks.baselines flow-grpo dancegrpo mixgrpo --iterations 4

The loops use all cores for one step after another; the service's roles have the threads that the recipe gives them. The
first iteration of each is left out. Both take turns on one machine. MixGRPO's loop follows the paper's description:
DanceGRPO's trainer, with ODE steps outside the window.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.baselines.loop import Practice, PublishedLoop
from benchmarks.service_vs_loop import ROOT, service
from euphonium.config import RunConfig, load_config

PRACTICES = (
    Practice(
        name="flow-grpo", recipe="recipes/embedded/flow-grpo.yaml", source="scripts/train_sd3.py",
        leaves_out_zeros=True,
    ),
    Practice(
        name="dancegrpo", recipe="recipes/embedded/dancegrpo.yaml", source="fastvideo/train_grpo_flux.py", batch=1,
        scored_alone=True,
    ),
    Practice(
        name="mixgrpo", recipe="recipes/embedded/mixgrpo.yaml", source="the paper, sections 3 and 4", batch=1,
        scored_alone=True,
    ),
)  # fmt: skip


def loop(config: RunConfig, practice: Practice, iterations: int) -> float:
    """Groups a second of a published trainer's loop."""
    run = PublishedLoop(config, practice)
    records = [run.iterate() for _ in range(iterations)][1:]
    seconds = sum(record["time/rollout_s"] + record["time/update_s"] for record in records)
    return config.rollout.prompts_per_iteration * len(records) / seconds


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [practice.name for practice in PRACTICES]
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(names)}; KEY=VALUE arguments change all recipes")
    parser.add_argument("--iterations", type=int, default=4)
    options = parser.parse_intermixed_args()
    overrides = [a for a in options.methods if "=" in a]
    wanted = [a for a in options.methods if "=" not in a] or names
    for practice in (p for p in PRACTICES if p.name in wanted):
        recipe = str(ROOT / practice.recipe)
        changed = [*overrides, f"iterations={options.iterations}", "evaluation.every=1000000"]
        config: RunConfig = load_config(recipe, changed)
        theirs = loop(config, practice, options.iterations)
        with tempfile.TemporaryDirectory() as folder:
            ours = service(recipe, changed, config.rollout.prompts_per_iteration, Path(folder), practice.name)
        size = config.rollout.group_size
        row = {"loop_samples_per_s": size * theirs, "service_samples_per_s": size * ours, "ratio": ours / theirs}
        print(json.dumps({"method": practice.name} | {k: round(v, 3) for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()

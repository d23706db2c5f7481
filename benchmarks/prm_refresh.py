"""What refreshing the process reward model is worth: its accuracy on the samples of a policy that has moved.

    python benchmarks/prm_refresh.py recipes/embedded/euphonium-sage.yaml --refresh every=12 margin=0.1

Trains the recipe in one process (single_process.py), once with the process reward model as it is and once with
``rewards.process.refresh``, from the same seed. Before and after, the policy draws groups for prompts that it was never
trained on, and pairs of their samples, ranked by the outcome rewards, are put to the process reward model: the share
that it ranks alike, by tenth of sigma. After the second run both the refreshed model and the one of the start answer,
on the same samples.

A trained policy's samples of one prompt are closer to each other, and close pairs are hard to rank for any model. What
the model lost is therefore read off against the start's pairs that are as far apart in their outcomes: one for each
pair after the run, the one with the nearest difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from single_process import CPU, SingleProcess

from euphonium.config import PrmRefreshConfig, RunConfig, load_config
from euphonium.generators.conditioning import stack_conditionings
from euphonium.rewards.process import ProcessRewardModel
from euphonium.rewards.total import weighted_total
from euphonium.wire.arrays import as_tensor
from euphonium.wire.records import GroupTask
from learners.engine.engine import Engine
from learners.rewards.preference import Preferences, gaps_by_noise, measured
from learners.rewards.preference_files import ranked_pairs
from orchestrator.groups.prompts import read_prompts

# Of the seeds of the measured groups, so that no training group shares them.
SEED = 1_000_000


@dataclass
class Alone:
    """What :func:`learners.rewards.preference.gaps_by_noise` needs of an engine, for one process."""

    model: ProcessRewardModel
    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over this one rank."""
        return values


@dataclass
class Ranked:
    """Samples of a policy, and how far the outcome rewards of each pair are apart, ``[pairs]``."""

    data: Preferences
    gaps: NDArray[np.float64]


def policy_samples(run: SingleProcess, prompts: list[str], margin: float) -> Ranked:
    """Groups that the policy draws now, as the recipe's sampler draws them, and their ranking."""
    latents, conditionings, totals = [], [], []
    for number, prompt in enumerate(prompts):
        task = GroupTask(group_id=number, prompt=prompt, seed=SEED + number, iteration=0)
        _, final, payload = run.worker.generate(task, run._source)
        latents.append(torch.from_numpy(final))
        conditionings.append({name: as_tensor(array) for name, array in payload.conditioning.items()})
        scores = run.orm.score(final, [prompt] * len(final))
        totals.append(np.asarray(weighted_total(scores, run.config.rewards.outcome, len(final))))
    owner = np.repeat(np.arange(len(prompts)), [len(part) for part in latents])
    together, total = torch.cat(latents), np.concatenate(totals)
    data = Preferences(
        latents=together,
        latent_shape=tuple(together.shape[1:]),
        prompt=owner,
        conditioning=stack_conditionings(conditionings),
        pairs=ranked_pairs(owner, total, margin),
    )
    return Ranked(data, total[data.pairs[:, 0]] - total[data.pairs[:, 1]])


def as_far_apart(samples: Ranked, others: Ranked) -> Ranked:
    """For each pair of the others the one of the samples whose outcomes differ by nearest to as much."""
    order = np.argsort(samples.gaps)
    ascending = samples.gaps[order]
    above = np.searchsorted(ascending, others.gaps).clip(1, len(ascending) - 1)
    nearest = above - (others.gaps - ascending[above - 1] < ascending[above] - others.gaps)
    chosen = order[nearest]
    return Ranked(replace(samples.data, pairs=samples.data.pairs[chosen]), samples.gaps[chosen])


def accuracy(model: ProcessRewardModel, samples: Ranked, pairs: int) -> dict[str, Any]:
    """By tenth of sigma, and how far the pairs are apart on average."""
    gaps = gaps_by_noise(cast(Engine, Alone(model)), samples.data, samples.data.pairs, per_tenth=pairs)
    found = {key: np.round(value, 3).tolist() for key, value in measured(gaps).items() if key.endswith("accuracy")}
    return found | {"outcomes_apart": round(float(samples.gaps.mean()), 3)}


def rows(config: RunConfig, prompts: list[str], pairs: int, margin: float) -> Iterator[dict[str, Any]]:
    """Accuracies before and after a run, of the model of the start and of the refreshed one."""
    process = config.rewards.process
    assert process is not None
    refreshed = process.refresh is not None
    run = SingleProcess(config)
    assert run.prm is not None
    start = ProcessRewardModel.load(Path(process.path), config.model)
    held_out = run.evaluate()["eval/total/mean"]
    first = policy_samples(run, prompts, margin)
    yield {"samples of": "the policy at the start", "model": "start", **accuracy(start, first, pairs)}
    drifts = []
    for iteration in range(1, config.iterations + 1):
        record = run.iterate()
        drifts.append(record.get("process/pairwise_accuracy", float("nan")))
        sys.stderr.write(f"refresh {refreshed}: iteration {iteration}/{config.iterations}\n")
    data = policy_samples(run, prompts, margin)
    name = "with refresh" if refreshed else "without refresh"
    equal = accuracy(start, as_far_apart(first, data), pairs)
    yield {"samples of": f"the policy at the start, as far apart as {name}", "model": "start", **equal}
    yield {"samples of": f"the policy trained {name}", "model": "start", **accuracy(start, data, pairs)}
    if refreshed:
        yield {"samples of": f"the policy trained {name}", "model": "refreshed", **accuracy(run.prm, data, pairs)}
    yield {
        "run": name,
        "held_out_total": [round(held_out, 4), round(run.evaluate()["eval/total/mean"], 4)],
        "pairwise_accuracy_in_training": [round(float(np.mean(drifts[:5])), 3), round(float(np.mean(drifts[-5:])), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--refresh", nargs="*", default=[], metavar="KEY=VALUE", help="of rewards.process.refresh")
    parser.add_argument("--runs", nargs="+", choices=["without", "with"], default=["without", "with"])
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts that are drawn for")
    parser.add_argument("--pairs", type=int, default=400, help="in each tenth of sigma")
    parser.add_argument("--margin", type=float, default=0.1, help="pairs whose outcomes are closer do not count")
    options = parser.parse_intermixed_args()
    config = load_config(options.recipe, options.overrides)
    assert config.rewards.process is not None, "the recipe has no process reward model"
    refresh = PrmRefreshConfig.model_validate(dict(item.split("=", 1) for item in options.refresh))
    process = config.rewards.process.model_copy(update={"refresh": refresh})
    with_refresh = config.model_copy(update={"rewards": config.rewards.model_copy(update={"process": process})})
    prompts = read_prompts(config.prompts.evaluation, "prompts.evaluation")[: options.prompts]
    variants = {"without": config, "with": with_refresh}
    for name in options.runs:
        for row in rows(variants[name], prompts, options.pairs, options.margin):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

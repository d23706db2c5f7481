"""The learner by itself, on groups from disk: training without rollouts, or the comparison with them alone.

One rank in this process; under ``torchrun`` each process is a rank of the group, as its environment says. The learner
is that of a run, ZeRO-3 included; only mailbox, weight store and checkpoints are missing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from euphonium.config import RunConfig
from orchestrator.debug.drawing import DrawnGroup, load_group, saved_iterations
from orchestrator.groups.credit import advantages, training_groups
from orchestrator.report.statistics import rollout_statistics
from orchestrator.report.tracking import METRICS_FILE

if TYPE_CHECKING:
    from euphonium.wire.records import TrainingGroup
    from learners.policy.learner import Learner

Say = Callable[[str], None]


@contextmanager
def learner_here(config: RunConfig) -> Iterator[Learner]:
    """The learner of a recipe in this process, alone or as one of several ranks."""
    import torch
    import torch.distributed as dist

    from learners.engine.zero3 import join_group
    from learners.policy.learner import Learner

    torch.set_num_threads(config.pools.learner.threads)
    for name, value in _alone().items():
        os.environ.setdefault(name, value)
    device = join_group(config.pools.learner.num_gpus)
    try:
        yield Learner(config, dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _alone() -> dict[str, str]:
    """Environment of the only rank of a group; nothing where there is one already."""
    if "RANK" in os.environ:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def credited(config: RunConfig, groups: Sequence[DrawnGroup]) -> tuple[list[TrainingGroup], dict[str, float]]:
    """The groups of an iteration with their advantages, and statistics of their rewards."""
    infos, scores = [group.info for group in groups], [group.scores for group in groups]
    results = advantages(config, infos, scores)
    trained = training_groups(config, infos, results)
    return trained, rollout_statistics(config, infos, scores, results)


def train_on_saved(config: RunConfig, folder: Path, output: Path, say: Say) -> None:
    """Trains on groups from disk, an update an iteration, and writes metrics as a run does; weights are not kept.

    Groups of later iterations were drawn by the policy of the first one, so they are off-policy here.

    Raises:
        ConfigError: there are no groups.
        TrainingError: they were drawn by another sampler, or rollout and learner disagree.
    """
    iterations = saved_iterations(folder)
    output.mkdir(parents=True, exist_ok=True)
    with learner_here(config) as learner:
        first = learner.rank == 0
        if first:
            (output / METRICS_FILE).write_text("", encoding="utf-8")
        for number, files in enumerate(iterations, 1):
            drawn = [load_group(file) for file in files]
            groups, statistics = credited(config, drawn)
            needed = learner.groups_needed(groups)
            metrics = learner.update(groups, {i: drawn[i].payload for i in needed})
            learner.version = number
            if first:
                record = {"iteration": number, "policy_version": number, **statistics, **metrics}
                with (output / METRICS_FILE).open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
                say(f"iteration {number}/{len(iterations)} | {_line(metrics)}")
        if first:
            say(f"metrics: {output / METRICS_FILE} (euphonium report {output})")


def probe_saved(config: RunConfig, folder: Path, say: Say) -> dict[str, float]:
    """Compares the learner's probabilities with the rollout's on the groups of the first iteration; trains nothing.

    Returns:
        ``|ratio - 1|``: its mean, 99th percentile and maximum, and the mean of every step.

    Raises:
        ConfigError: there are no groups.
        TrainingError: they were drawn by another sampler.
    """
    drawn = [load_group(file) for file in saved_iterations(folder)[0]]
    groups, _ = credited(config, drawn)
    with learner_here(config) as learner:
        needed = learner.groups_needed(groups)
        found = learner.alignment(groups, {i: drawn[i].payload for i in needed})
        if learner.rank == 0:
            for line in describe_alignment(config, found):
                say(line)
    return found


def describe_alignment(config: RunConfig, found: Mapping[str, float]) -> list[str]:
    """The comparison for people to read, and whether a run would warn or end."""
    objective = config.objective
    lines = [f"{name:<12} |ratio - 1| = {value:.3g}" for name, value in found.items()]
    if found["mean"] > objective.ratio_tolerance or found["p99"] > objective.ratio_tolerance_p99:
        verdict = "a run would end: above objective.ratio_tolerance or ratio_tolerance_p99"
    elif found["mean"] > objective.ratio_alarm:
        verdict = "a run would warn: above objective.ratio_alarm"
    else:
        return [*lines, f"rollout and learner agree (objective.ratio_alarm is {objective.ratio_alarm:g})"]
    return [*lines, f"{verdict}; check model.dtype and the attention backends of both sides"]


def _line(metrics: Mapping[str, float]) -> str:
    shown = ("loss", "grad_norm", "clip_fraction", "ratio_mean", "ratio_deviation", "denoising_error")
    return "  ".join(f"{name} {metrics[f'policy/{name}']:.4g}" for name in shown if f"policy/{name}" in metrics)

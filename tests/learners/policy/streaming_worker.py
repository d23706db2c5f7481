"""One rank that makes the same updates in several ways, and writes what became of the weights."""

import dataclasses
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from euphonium.config import RunConfig, load_config
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.engine.zero3 import join_group
from learners.policy.learner import Learner
from tests.learners.groups import training_group

Way = Callable[[Learner, list[TrainingGroup], list[GroupPayload]], dict[str, float]]


def numbered(group: TrainingGroup, ordinal: int) -> TrainingGroup:
    task = dataclasses.replace(group.info.task, group_id=ordinal)
    return dataclasses.replace(group, info=dataclasses.replace(group.info, task=task))


def needed(positions: set[int], payloads: list[GroupPayload]) -> dict[int, GroupPayload]:
    """Only the groups that this rank asks for."""
    return {position: payloads[position] for position in positions}


def whole(learner: Learner, groups: list[TrainingGroup], payloads: list[GroupPayload]) -> dict[str, float]:
    return learner.update(groups, needed(learner.groups_needed(groups), payloads))


def streamed(learner: Learner, groups: list[TrainingGroup], payloads: list[GroupPayload]) -> dict[str, float]:
    for count in range(1, len(groups)):
        wanted = learner.groups_to_begin(groups[:count], len(groups))
        learner.begin(groups[:count], len(groups), needed(wanted, payloads))
        # What the learner group may be asked for in between.
        for _ in learner.policy.gathered(1 << 18):
            pass
    return whole(learner, groups, payloads)


def with_a_loss(learner: Learner, groups: list[TrainingGroup], payloads: list[GroupPayload]) -> dict[str, float]:
    """Three groups were counted on, and the second is lost after two have been begun with."""
    learner.begin(groups[:2], 3, dict(enumerate(payloads[:2])))
    return whole(learner, [groups[0], groups[2]], [payloads[0], payloads[2]])


def without_it(learner: Learner, groups: list[TrainingGroup], payloads: list[GroupPayload]) -> dict[str, float]:
    return whole(learner, [groups[0], groups[2]], [payloads[0], payloads[2]])


def zeros(*flat: int, skip: bool) -> Way:
    """Groups without an advantage, of which all rows are computed, or none but what keeps each update going."""

    def way(learner: Learner, groups: list[TrainingGroup], payloads: list[GroupPayload]) -> dict[str, float]:
        if learner.updates_done:  # so that there is momentum
            for position in flat:
                group = groups[position]
                alone = len(flat) == len(groups) and position == flat[0]
                left = int(alone or learner.config.objective.updates_per_iteration > 1)
                samples = group.samples[:left] if skip else group.samples
                zero = np.zeros_like(group.advantages)
                groups[position] = dataclasses.replace(group, advantages=zero, samples=samples)
        return whole(learner, groups, payloads)

    return way


WAYS: dict[str, Way] = {
    "whole": whole, "streamed": streamed, "with a loss": with_a_loss, "without it": without_it,
    "zero rows": zeros(1, skip=False), "zero rows skipped": zeros(1, skip=True),
    "zero batch": zeros(0, 1, 2, skip=False), "zero batch skipped": zeros(0, 1, 2, skip=True),
}  # fmt: skip


def result(config: RunConfig, device: torch.device, iterations: list, way: Way) -> dict[str, object]:
    learner = Learner(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    fingerprint = learner.family.step_table(config.sampler).fingerprint()
    history = []
    for payloads, advantages in iterations:
        groups = [training_group(p, a[None], fingerprint) for p, a in zip(payloads, advantages, strict=True)]
        groups = [numbered(group, len(history) * len(groups) + i) for i, group in enumerate(groups)]
        history.append(way(learner, groups, payloads))
    weights: dict[str, torch.Tensor] = {}
    for bucket in learner.policy.gathered(1 << 18):
        weights |= {name: tensor.clone() for name, tensor in bucket.items()}
    return {"history": history, "weights": weights}


def main() -> None:
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    config = load_config(target / "recipe.yaml")
    device = join_group(config.pools.learner.num_gpus)
    iterations = pickle.loads((target / "groups.pkl").read_bytes())
    results = {name: result(config, device, iterations, way) for name, way in WAYS.items()}
    torch.save(results, target / f"rank_{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


main()

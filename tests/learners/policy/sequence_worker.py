"""One rank that trains on the same groups alone with its samples and sharing them with others; writes what came of it.

Arguments: the file to write, and recipes. Each is trained with every divisor of the group's size that it can take.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig, load_config
from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from euphonium.generators.sequence import check_sequence_parallel
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.engine.zero3 import join_group
from learners.policy.checkpoint import load_rank_state, save_rank_state
from learners.policy.learner import Learner
from tests.learners.groups import drawn

ITERATIONS = 2

Drawn = list[tuple[list[TrainingGroup], list[GroupPayload]]]


def started(config: RunConfig, ranks: int, device: torch.device) -> Learner:
    learner = config.pools.learner.model_copy(update={"sequence_parallel": ranks})
    pools = config.pools.model_copy(update={"learner": learner})
    config = config.model_copy(update={"pools": pools})
    return Learner(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def step(learner: Learner, groups: list[TrainingGroup], payloads: list[GroupPayload]) -> dict[str, Any]:
    """An iteration of which the first group is there before the others; what it leaves on rank 0."""
    beginning = learner.groups_to_begin(groups[:1], len(groups))
    learner.begin(groups[:1], len(groups), {position: payloads[position] for position in beginning})
    needed = learner.groups_needed(groups)
    metrics = learner.update(groups, {position: payloads[position] for position in needed})
    learner.version += 1
    policy = learner.policy
    found = {"metrics": metrics, "weights": policy.whole("weights"), "moments": policy.whole("exp_avg")}
    if policy.averages is not None:
        found["averages"] = policy.whole("average")
    return found


def trained(config: RunConfig, ranks: int, given: Drawn, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """All iterations, and the last one again by a group that takes up the checkpoint before it and shares nothing."""
    learner = started(config, ranks, device)
    found = []
    for groups, payloads in given:
        if learner.version == ITERATIONS - 1:
            save_rank_state(learner, folder)
        found.append(step(learner, groups, payloads))
    again = started(config, 1, device)
    load_rank_state(again, folder)
    again.version = ITERATIONS - 1
    return [*found, step(again, *given[-1])]


def able(config: RunConfig, ranks: int) -> bool:
    try:
        check_sequence_parallel(open_generator(config.model), ranks)
    except ConfigError:
        return False
    return dist.get_world_size() % ranks == 0


def main() -> None:
    torch.set_num_threads(1)
    device = join_group(0)
    results: dict[str, dict[int, Any]] = {}
    for name in sys.argv[2:]:
        recipe = Path(name)
        config = load_config(recipe)
        worker = RolloutWorker(config, device)
        given = [drawn(worker, config, iteration) for iteration in range(ITERATIONS)]
        folder = recipe.parent / "checkpoint"
        folder.mkdir(exist_ok=True)
        results[recipe.parent.name] = {
            ranks: trained(config, ranks, given, device, folder) for ranks in (1, 2, 4) if able(config, ranks)
        }
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


main()

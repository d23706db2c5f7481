"""One rank that trains tiny models in bfloat16 the way a run does, for one recipe after another; writes what it saw."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig, load_config
from learners.engine.zero3 import join_group
from learners.policy.checkpoint import load_rank_state, save_rank_state
from learners.policy.learner import Learner
from tests.learners.groups import drawn

ITERATIONS = 2


def train(config: RunConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """Metrics of all iterations, and those of the last one again after a restart from a checkpoint."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    worker = RolloutWorker(config, device)
    learner = Learner(config, rank, world_size, device)
    seen: list[dict[str, float]] = []
    sent: set[str] = set()
    for iteration in range(ITERATIONS):
        weights = published(learner)
        worker.load_weights(learner.version, weights.items())
        groups, payloads = drawn(worker, config, iteration)
        sent |= {str(array.dtype) for payload in payloads for array in payload.conditioning.values()}
        if iteration == ITERATIONS - 1:
            save_rank_state(learner, folder)
        seen.append(learner.update(groups, dict(enumerate(payloads))))
        learner.version += 1
    again = Learner(config, rank, world_size, device)
    load_rank_state(again, folder)
    again.version = ITERATIONS - 1
    repeated = again.update(groups, dict(enumerate(payloads)))
    first, last = weights, published(learner)
    moved = max(float((last[name].float() - first[name].float()).abs().max()) for name in last)
    types = sorted({str(tensor.dtype) for tensor in last.values()} | {str(p.dtype) for p in worker.published.values()})
    return {"metrics": seen, "repeated": repeated, "moved": moved, "types": types, "sent": sorted(sent)}


def published(learner: Learner) -> dict[str, torch.Tensor]:
    """The learner's whole weights, on every rank."""
    whole: dict[str, torch.Tensor] = {}
    for bucket in learner.policy.gathered(1 << 18):
        whole |= bucket
    everywhere = [whole]
    dist.broadcast_object_list(everywhere, src=0)
    return everywhere[0]


def main() -> None:
    torch.set_num_threads(1)
    device = join_group(float(torch.cuda.is_available()))
    gc.freeze()
    recipes = [Path(name) for name in sys.argv[2:]]
    seen = {}
    for recipe in recipes:
        folder = recipe.parent / "checkpoint"
        folder.mkdir(exist_ok=True)
        seen[recipe.parent.name] = train(load_config(recipe), folder, device)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


main()

"""One rank that trains on noised samples: in one go, with beginnings, and cut off and gone on from a checkpoint.

It does so with the recipe in each of some folders.
"""

import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from euphonium.config import load_config
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.engine.zero3 import join_group
from learners.policy.checkpoint import load_rank_state, save_rank_state
from learners.policy.learner import Learner

Iterations = list[tuple[list[TrainingGroup], list[GroupPayload]]]


class Trained:
    """A learner and what it has reported."""

    def __init__(self, folder: Path) -> None:
        config = load_config(folder / "recipe.yaml")
        device = torch.device("cpu")
        self.learner = Learner(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
        self.history: list[dict[str, float]] = []

    def on(self, iterations: Iterations, *, streamed: bool = False) -> "Trained":
        for groups, payloads in iterations:
            if streamed:
                self.learner.begin(groups[:2], len(groups), dict(enumerate(payloads[:2])))
            needed = self.learner.groups_needed(groups)
            self.history.append(self.learner.update(groups, {i: payloads[i] for i in needed}))
        return self

    def result(self) -> dict[str, object]:
        weights: dict[str, torch.Tensor] = {}
        for bucket in self.learner.policy.gathered(1 << 18):
            weights |= {name: tensor.clone() for name, tensor in bucket.items()}
        return {"history": self.history, "weights": weights}


def train(folder: Path) -> None:
    iterations: Iterations = pickle.loads((folder / "groups.pkl").read_bytes())
    results = {}
    trained = Trained(folder)
    before = trained.result()
    trained.on(iterations[:1])
    save_rank_state(trained.learner, folder / "checkpoint")
    results["whole"] = trained.on(iterations[1:]).result()
    results["streamed"] = Trained(folder).on(iterations, streamed=True).result()
    resumed = Trained(folder)
    load_rank_state(resumed.learner, folder / "checkpoint")
    results["resumed"] = resumed.on(iterations[1:]).result()
    if dist.get_rank() == 0:
        torch.save(results | {"before": before}, folder / "result.pt")


def main() -> None:
    torch.set_num_threads(1)
    join_group(0)
    for name in sys.argv[1:]:
        train(Path(name))
    dist.barrier()
    dist.destroy_process_group()


main()

"""One rank of the ZeRO-3 tests: trains on the groups in each of some folders, and writes what it holds."""

import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from euphonium.config import load_config
from learners.engine.zero3 import join_group, shard
from learners.policy.learner import Learner
from tests.learners.groups import training_group


def train(folder: Path, device: torch.device) -> dict[str, object]:
    config = load_config(folder / "recipe.yaml")
    learner = Learner(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    iterations = pickle.loads((folder / "groups.pkl").read_bytes())
    history = []
    for payloads, advantages in iterations:
        fingerprint = learner.family.step_table(config.sampler).fingerprint()
        groups = [training_group(p, a[None], fingerprint) for p, a in zip(payloads, advantages, strict=True)]
        history.append(learner.update(groups, dict(enumerate(payloads))))
    pieces = {name: shard(p).numel() for name, p in learner.policy.parameters.items()}
    numels = {name: p.ds_numel for name, p in learner.policy.parameters.items()}
    resident = sum(p.data.numel() for p in learner.policy.parameters.values())
    whole: dict[str, torch.Tensor] = {}
    for bucket in learner.policy.gathered(1 << 18):
        whole |= bucket
    average: dict[str, torch.Tensor] = {}
    if learner.policy.averages is not None:
        for bucket in learner.policy.gathered(1 << 18, average=True):
            average |= bucket
    return {
        "history": history, "pieces": pieces, "numels": numels, "resident": resident, "whole": whole,
        "average": average,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    folders = [Path(name) for name in sys.argv[1:]]
    device = join_group(load_config(folders[0] / "recipe.yaml").pools.learner.num_gpus)
    for folder in folders:
        torch.save(train(folder, device), folder / f"rank_{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


main()

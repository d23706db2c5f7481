"""One rank of the checkpoint test: loads a checkpoint if one is given, saves one, and trains on given groups."""

import json
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from euphonium.config import load_config
from learners.engine.zero3 import join_group
from learners.policy.checkpoint import load_rank_state, save_rank_state
from learners.policy.learner import Learner
from tests.learners.groups import training_group


def main() -> None:
    folder, job_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    torch.set_num_threads(1)
    config = load_config(folder / "recipe.yaml")
    learner = Learner(
        config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), join_group(config.pools.learner.num_gpus)
    )
    iterations = pickle.loads((folder / "groups.pkl").read_bytes())
    if job["load"]:
        load_rank_state(learner, folder / job["load"])
        if job["save"]:
            save_rank_state(learner, folder / job["save"])
    history = []
    for i in job["iterations"]:
        payloads, advantages = iterations[i]
        fingerprint = learner.family.step_table(config.sampler).fingerprint()
        groups = [training_group(p, a[None], fingerprint) for p, a in zip(payloads, advantages, strict=True)]
        history.append(learner.update(groups, dict(enumerate(payloads))))
        if job["save_after"] == i:
            save_rank_state(learner, folder / job["save"])
    weights = {}
    for bucket in learner.policy.gathered(1 << 18):
        weights |= bucket
    average = {}
    for bucket in learner.policy.gathered(1 << 18, average=True):
        average |= bucket
    if learner.rank == 0:
        torch.save({"history": history, "weights": weights, "average": average}, folder / job["result"])
    dist.barrier()
    dist.destroy_process_group()


main()

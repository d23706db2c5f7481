"""Groups as the learner gets them, around given transitions."""

import json
import pickle
from pathlib import Path

import numpy as np

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.wire.records import Array, GroupInfo, GroupPayload, GroupTask, TrainingGroup


def training_group(
    payload: GroupPayload, advantages: Array, fingerprint: str = "", samples: Array | None = None
) -> TrainingGroup:
    """A group of the first policy; ``advantages``: ``[components, group, num_steps]``; ``samples``: all by default."""
    info = GroupInfo(
        task=GroupTask(group_id=0, prompt="", seed=0), policy_version=0, fingerprint=fingerprint,
        rows=payload.rows, process_rewards=None, seconds={}, payload_bytes=payload.nbytes,
    )  # fmt: skip
    chosen = np.arange(len(payload.steps)) if samples is None else samples
    return TrainingGroup(info=info, advantages=advantages, samples=chosen, counted=len(chosen))


def drawn(worker: RolloutWorker, config: RunConfig, iteration: int) -> tuple[list[TrainingGroup], list[GroupPayload]]:
    """An iteration's groups, as they come out of the object store, with made-up advantages; prompts are JSON lines."""
    prompts = Path(config.prompts.train).read_text().splitlines()
    rng = np.random.default_rng(iteration)
    groups, payloads = [], []
    for i, line in enumerate(prompts):
        task = GroupTask(group_id=i, prompt=json.loads(line)["prompt"], seed=10 * iteration + i)
        info, _, payload = worker.generate(task, None)
        payloads.append(pickle.loads(pickle.dumps(payload, protocol=5)))
        size = config.rollout.group_size
        advantages = rng.standard_normal((1, size, config.sampler.num_steps)).astype(np.float32)
        groups.append(TrainingGroup(info=info, advantages=advantages, samples=np.arange(size), counted=size))
    return groups, payloads

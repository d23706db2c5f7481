"""Groups as the learner gets them, around given transitions."""

import numpy as np

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

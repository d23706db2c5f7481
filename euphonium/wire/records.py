"""Plain records that travel between the roles. Arrays are numpy: Ray moves those without copying."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """An order for one group of samples.

    Attributes:
        group_id: ordinal of the group in the run; never used twice, except to try the same group again.
        prompt: text of the group.
        seed: of its noise and of the selection of its trained steps.
        iteration: from 0, the iteration that it is drawn for; moving windows depend on it.
    """

    group_id: int
    prompt: str
    seed: int
    iteration: int = 0


@dataclass(frozen=True, kw_only=True)
class RolloutContext:
    """What a rollout actor works with at the moment; it comes with every order, because pools and weights change.

    Attributes:
        version: oldest policy version that may be used; a newer published one is taken when there is one.
        epoch: of the weights' history. It begins anew when the run goes back to a checkpoint: versions of an earlier
            epoch are other weights.
        kind: ``policy``, or ``average`` for the moving average.
        prm_servers: names of the PRM servers.
        prm_nodes: ids of their nodes, in the same order; empty where it is not known yet.
        orm_servers: names of the ORM servers.
    """

    version: int
    epoch: int
    kind: str = "policy"
    prm_servers: tuple[str, ...] = ()
    prm_nodes: tuple[str, ...] = ()
    orm_servers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """What the orchestrator needs to know of a finished group; its arrays stay in the object store.

    Attributes:
        task: the order that it fills.
        policy_version: of the weights that drew it, the same for all its steps.
        fingerprint: of the sampler (:meth:`euphonium.dynamics.StepTable.fingerprint`).
        transitions: trained transitions of each sample, K.
        process_rewards: float32 ``[group, num_steps]`` that the actions are credited with, 0 where none was asked for;
            None without process rewards.
        seconds: wall time by part of the work.
        payload_bytes: size of the arrays that the learner will fetch.
    """

    task: GroupTask
    policy_version: int
    fingerprint: str
    transitions: int
    process_rewards: Array | None
    seconds: dict[str, float]
    payload_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupPayload:
    """Trained transitions of a group, K a sample.

    Attributes:
        states: float32 ``[group, K, *latent]``, x_k.
        next_states: float32, like ``states``, x_{k+1} as it was scored.
        steps: int64 ``[group, K]``, k of every transition.
        log_probs: float32 ``[group, K]`` under the policy that drew them.
        gradients: float32 like ``states`` when the objective keeps the guidance in the mean, else None.
        conditioning: arrays of the prompt, with a leading dimension of 1.
    """

    states: Array
    next_states: Array
    steps: Array
    log_probs: Array
    gradients: Array | None
    conditioning: dict[str, Array]

    @property
    def nbytes(self) -> int:
        """Size of all arrays."""
        arrays = [self.states, self.next_states, self.steps, self.log_probs, *self.conditioning.values()]
        return sum(a.nbytes for a in arrays) + (self.gradients.nbytes if self.gradients is not None else 0)


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """What the learner group does next.

    Attributes:
        iteration: number of this transaction; the policy it yields gets this version.
        num_groups: groups to train on; 0 for a plan that only checkpoints or publishes.
        publish: whether the weights are published; plans with groups publish in any case.
        publish_average: whether the averaged weights are published too.
        checkpoint: folder into which every rank writes its part, or None.
        stop: leave the loop afterwards.
        receivers: rollout actors to which the weights are broadcast.
        epoch: of the run, how often it has been rewound; weights of an earlier one are void.
    """

    iteration: int
    num_groups: int
    publish: bool = False
    publish_average: bool = False
    checkpoint: str | None = None
    stop: bool = False
    receivers: tuple[str, ...] = ()
    epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class WeightOrder:
    """What a rollout actor is told about a broadcast of weights.

    Attributes:
        version: policy version.
        kind: ``policy`` or ``average``.
        epoch: of the run.
        address: ``host:port`` where the channel's members meet.
        transfer: number of the broadcast in this channel.
        rank: of the actor in the channel, from 1.
        size: number of members of the channel.
    """

    version: int
    kind: str
    epoch: int
    address: str = ""
    transfer: int = 0
    rank: int = 0
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What the learner group did with a plan.

    Attributes:
        iteration: of the plan.
        metrics: numbers of the update, already reduced over the ranks.
    """

    iteration: int
    metrics: dict[str, float] = field(default_factory=dict)

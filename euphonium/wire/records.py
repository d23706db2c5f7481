"""Plain records that travel between the roles. Arrays are numpy: Ray moves those without copying."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ray import ObjectRef

Array = NDArray[np.generic]
# Clips, uint8 ``[batch, frames, height, width, 3]``.
Videos = NDArray[np.uint8]
# ``average`` is the moving average of the policy's weights.
WeightKind = Literal["policy", "average"]
# Rewards ``[samples]``, and their gradient like the states if it was wanted, float32.
PrmAnswer = tuple[Array, Array | None]
# Rewards by name, float32 ``[samples]`` each.
OrmAnswer = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """What an actor says once its models are loaded, and then every few seconds.

    Attributes:
        device: that it computes on.
        node: id of its Ray node.
        busy_s: seconds that it has spent computing since it started; None where the caller keeps count.
    """

    device: str
    node: str = ""
    busy_s: float | None = None


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
class TrainingGroup:
    """A scored group on its way to the learner group.

    Attributes:
        info: what is known of it.
        advantages: float32 ``[components, group, num_steps]``.
        samples: int64, samples to train on, ascending.
    """

    info: GroupInfo
    advantages: Array
    samples: Array

    @property
    def rows(self) -> int:
        """Its trained transitions."""
        return len(self.samples) * self.info.transitions


@dataclass(frozen=True, kw_only=True)
class Update:
    """Train on an iteration's groups, and publish the new weights.

    Attributes:
        version: number of this transaction, from 1; the policy that it yields gets this version.
        groups: of the iteration.
        payloads: references to their transitions, in the same order; the driver owns the arrays.
        publish_average: whether the averaged weights are published too.
        checkpoint: folder into which every rank writes its part, or None.
        receivers: names of the rollout actors to which the weights are broadcast.
        history: of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
        stop: leave afterwards.
    """

    version: int
    groups: tuple[TrainingGroup, ...]
    payloads: tuple[ObjectRef[GroupPayload], ...]
    publish_average: bool = False
    checkpoint: str | None = None
    receivers: tuple[str, ...] = ()
    history: int = 0
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Publish the weights that are held once more.

    Attributes:
        version: of the policy that is held.
        average: whether the averaged weights are published too.
        stop: leave afterwards.
    """

    version: int
    average: bool
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Save:
    """Write a checkpoint.

    Attributes:
        version: of the policy that is held.
        folder: into which every rank writes its part.
        stop: leave afterwards.
    """

    version: int
    folder: str
    stop: bool = False


# What the learner group does next.
UpdateOrder = Update | Publish | Save


@dataclass(frozen=True, kw_only=True)
class WeightOrder:
    """What a rollout actor is told about a broadcast of weights.

    Attributes:
        version: policy version.
        kind: of weights.
        history: of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
        address: ``host:port`` where the channel's members meet.
        transfer: number of the broadcast in this channel.
        rank: of the actor in the channel, from 1.
        size: number of members of the channel.
    """

    version: int
    kind: WeightKind
    history: int
    address: str = ""
    transfer: int = 0
    rank: int = 0
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What the learner group did with an order.

    Attributes:
        version: of the order.
        metrics: numbers of the update, already reduced over the ranks.
    """

    version: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """What the run loop hears while it waits for the learner group.

    Attributes:
        report: of the awaited order, or None while it is under way.
        failure: why the group gave up, or None.
        generation: how often a group has joined.
        ready: whether it can take orders.
        resumed: policy version of the checkpoint from which it started last.
    """

    report: UpdateReport | None
    failure: str | None
    generation: int
    ready: bool
    resumed: int


@dataclass(frozen=True, kw_only=True)
class PoolSnapshot:
    """What ``euphonium status`` shows of a pool.

    Attributes:
        wanted: members that were asked for.
        present: members that take work.
        working: members that do something; None where it is not known.
        busy: share of its members' time that the pool worked in the last iteration.
        members: state of every member, by name.
    """

    wanted: int
    present: int
    working: int | None
    busy: float
    members: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """What ``euphonium status`` shows of a run.

    Attributes:
        phase: what is under way.
        version: of the policy, the iterations done.
        iterations: of the whole run.
        pools: by role.
        groups: in the trajectory buffer.
        nbytes: of these groups.
        last: line of the last iteration.
    """

    phase: str
    version: int
    iterations: int
    pools: dict[str, PoolSnapshot]
    groups: int
    nbytes: int
    last: str

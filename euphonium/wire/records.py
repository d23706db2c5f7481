"""The records that roles exchange. Arrays are numpy, which Ray's object store shares without copying."""

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
    """An actor's answer to a ping, from the moment that its models are loaded.

    Attributes:
        device: device that it computes on.
        node: id of its Ray node.
        busy_s: seconds that it has computed since it started; None where the caller measures that.
    """

    device: str
    node: str = ""
    busy_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """What a rollout actor needs to know to draw one group of samples, or some of them.

    Attributes:
        group_id: ordinal of the group in the run; used again only to retry the same group.
        prompt: the text that all samples of the group share.
        seed: seed of its noise and of the choice of its trained steps.
        iteration: iteration (from 0) that it is drawn for; moving windows depend on it.
        strength: multiple of the recipe's guidance that its members get.
        members: half-open range of the samples that are drawn; None for all. Seed and choice of steps are the group's.
    """

    group_id: int
    prompt: str
    seed: int
    iteration: int = 0
    strength: float = 1.0
    members: tuple[int, int] | None = None

    def __str__(self) -> str:
        group = f"group {self.group_id}"
        return group if self.members is None else f"samples {self.members[0]}-{self.members[1] - 1} of {group}"


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """What the orchestrator knows of a finished group, whose arrays stay in the object store.

    Attributes:
        task: the task that it was drawn for.
        policy_version: version of the policy that drew it, the same for all of its steps.
        fingerprint: the sampler's (:meth:`euphonium.dynamics.StepTable.fingerprint`).
        rows: int64 ``[group, K]``, numbers of the states that the K trained transitions of each sample leave; equal
            where samples share a state.
        process_rewards: float32 ``[group, num_steps]``, process reward that each action is credited with, 0 at steps
            without one; None without process rewards.
        final_rewards: float32 ``[group]``, process rewards of the finished samples, where they count as an outcome
            reward; else None.
        seconds: wall time by part of the work.
        payload_bytes: size of the arrays that the learner group fetches.
        reused: share of the passes that reused what the last one computed (``rollout.reuse_below``).
    """

    task: GroupTask
    policy_version: int
    fingerprint: str
    rows: NDArray[np.int64]
    process_rewards: Array | None
    seconds: dict[str, float]
    payload_bytes: int
    final_rewards: Array | None = None
    reused: float = 0.0

    @property
    def transitions(self) -> int:
        """K, trained transitions of each sample."""
        return int(self.rows.shape[1])


@dataclass(frozen=True, kw_only=True)
class GroupPayload:
    """The trained transitions of a group, K of every sample.

    Attributes:
        states: float32 ``[states, *latent]``, exactly as log-probabilities were computed; those that consecutive
            transitions share are there once.
        rows: int64 ``[group, K]``, where x_k of every transition is in ``states``; equal where samples share it.
        next_rows: int64 ``[group, K]``, where x_{k+1} is.
        steps: int64 ``[group, K]``, k of every transition.
        log_probs: float32 ``[group, K]``, log-probabilities under the policy that drew them.
        gradients: float32 ``[group, K, *latent]``, reward gradients, where the objective keeps guidance in the mean;
            else None.
        conditioning: the encoded prompt, arrays with a leading dimension of 1.
    """

    states: Array
    rows: NDArray[np.int64]
    next_rows: NDArray[np.int64]
    steps: Array
    log_probs: Array
    gradients: Array | None
    conditioning: dict[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [self.states, self.rows, self.next_rows, self.steps, self.log_probs, *self.conditioning.values()]
        return sum(a.nbytes for a in arrays) + (self.gradients.nbytes if self.gradients is not None else 0)


@dataclass(frozen=True, kw_only=True)
class TrainingGroup:
    """A group with its advantages, on its way to the learner group.

    Attributes:
        info: which group, and by which policy and sampler it was drawn.
        advantages: float32 ``[components, group, num_steps]``.
        samples: int64 indices of the samples whose transitions the learner group computes, ascending.
        counted: number of samples that the loss is the mean of: those, and others whose advantage is 0.
    """

    info: GroupInfo
    advantages: Array
    samples: NDArray[np.int64]
    counted: int

    @property
    def rows(self) -> int:
        """Number of transitions that the loss is the mean of."""
        return self.counted * self.info.transitions

    @property
    def states(self) -> int:
        """Number of different states that the computed transitions leave, each of which the network sees once."""
        return len(np.unique(self.info.rows[self.samples]))

    @property
    def skipped(self) -> int:
        """Number of transitions that count in the mean and are not computed."""
        return (self.counted - len(self.samples)) * self.info.transitions


@dataclass(frozen=True, kw_only=True)
class Update:
    """Order to train on an iteration's groups, and to publish the new weights.

    Attributes:
        version: number of the iteration, from 1, which becomes the new policy's version.
        groups: the iteration's groups.
        payloads: references to their transitions, in the same order; the driver owns the arrays.
        publish_average: whether the averaged weights are published too.
        checkpoint: folder into which every rank writes its part of a checkpoint, or None.
        receivers: names of the rollout actors that take part in a broadcast of the weights; empty for none.
        history: history of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
        stop: whether the learner group ends afterwards.
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
class Begin:
    """Order to begin with an iteration's update while its last groups are still being drawn.

    Gradients are added up, and the weights stay as they are until the :class:`Update` with all groups comes, which goes
    on from there. If that turns out to be of other groups, because one was lost, it begins anew.

    Attributes:
        version: the policy version that the learner group holds.
        groups: the groups that are there, which are the first of the iteration.
        payloads: references to their transitions, in the same order.
        expected: number of groups that the iteration will have.
        stop: never.
    """

    version: int
    groups: tuple[TrainingGroup, ...]
    payloads: tuple[ObjectRef[GroupPayload], ...]
    expected: int
    stop: Literal[False] = False


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Order to publish the present weights once more.

    Attributes:
        version: the policy version that the learner group holds.
        average: whether the averaged weights are published too.
        stop: whether the learner group ends afterwards.
    """

    version: int
    average: bool
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Save:
    """Order to write a checkpoint.

    Attributes:
        version: the policy version that the learner group holds.
        folder: folder into which every rank writes its part.
        stop: whether the learner group ends afterwards.
    """

    version: int
    folder: str
    stop: bool = False


# What the learner group does next.
UpdateOrder = Begin | Update | Publish | Save


@dataclass(frozen=True, kw_only=True)
class WeightOrder:
    """Order to a rollout actor to take part in a broadcast of weights.

    Attributes:
        version: policy version of the weights.
        kind: the policy's weights or their moving average.
        history: history of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
        address: ``host:port`` where the channel's members meet.
        transfer: number of the broadcast in this channel.
        rank: the actor's rank in the channel, from 1.
        size: number of members of the channel, the sender included.
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
    """The learner group's report that an order is done.

    Attributes:
        version: version of the order.
        metrics: metrics of an update, reduced over the ranks, and durations of what the order was.
    """

    version: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """State of the learner group, as the mailbox tells it to the run loop.

    Attributes:
        report: report of the order that is waited for, or None while it is under way.
        failure: why the group gave up, or None.
        generation: number of the learner group that has joined the mailbox; 0 for none, and no two share one.
        ready: whether the group can take orders.
        resumed: policy version of the checkpoint from which it started.
        silent_s: seconds since its last sign of life, or since the order that is under way.
    """

    report: UpdateReport | None
    failure: str | None
    generation: int
    ready: bool
    resumed: int
    silent_s: float


@dataclass(frozen=True, kw_only=True)
class PoolSnapshot:
    """What ``euphonium status`` shows of a pool.

    Attributes:
        wanted: size of the pool that was asked for.
        present: number of members that take work.
        working: number of members that work for a caller; None where it is not known.
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
        phase: what is under way, as a phrase.
        version: policy version, which is the number of iterations done.
        iterations: number of iterations of the whole run.
        pools: pools by role.
        groups: number of groups in the trajectory buffer.
        nbytes: bytes of these groups.
        last: the line that was printed for the last iteration.
    """

    phase: str
    version: int
    iterations: int
    pools: dict[str, PoolSnapshot]
    groups: int
    nbytes: int
    last: str

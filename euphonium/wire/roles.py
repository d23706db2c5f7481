"""What every Ray actor of a run answers to: the walls between the roles, typed.

An actor's class lives with its role, and no role imports another; what crosses the wall is declared here. A handle is
an ``ActorProxy[PrmServer]``, so that a misspelt method, a missing argument or a wrong type in a ``.remote(...)`` call
is an error of the type check. Arguments may be values or references to them (``T | ObjectRef[T]``), and are passed by
position. That the classes keep to these declarations is checked by a test, which compares the signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import ray
from ray import ObjectRef
from ray.actor import ActorHandle, ActorProxy

from euphonium.wire.records import (
    Array,
    GroupInfo,
    GroupPayload,
    GroupTask,
    LearnerState,
    OrmAnswer,
    PrmAnswer,
    Readiness,
    RunSnapshot,
    UpdateOrder,
    UpdateReport,
    Videos,
    WeightKind,
    WeightOrder,
)
from euphonium.wire.weights.manifest import Bucket, WeightManifest

_T = TypeVar("_T")
_P = ParamSpec("_P")


class PoolMember(Protocol):
    """What an actor of any pool answers."""

    @ray.method
    def ready(self) -> Readiness:
        """Answers once the models are loaded."""
        ...


@dataclass(frozen=True)
class ServerRef(Generic[_T]):
    """A server, and where it is.

    Attributes:
        handle: of its actor; two of them are equal if they are of one actor, which keeps its identity when Ray restarts
            it.
        name: of its actor, by which all clients mean the same one.
        node: id of its Ray node; empty where it is not known.
    """

    handle: ActorProxy[_T]
    name: str = field(compare=False)
    node: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class RolloutContext:
    """What a rollout actor works with at the moment; it comes with every order, because pools and weights change.

    Attributes:
        version: oldest policy version that may be used; a newer published one is taken when there is one.
        history: of the weights. It begins anew when the run goes back to a checkpoint: versions of an earlier history
            are other weights.
        kind: of weights.
        prm_servers: the pool of PRM servers.
        orm_servers: the pool of ORM servers.
        balancer: counts the outstanding requests of both; None where nobody does.
    """

    version: int
    history: int
    kind: WeightKind = "policy"
    prm_servers: tuple[ServerRef[PrmServer], ...] = ()
    orm_servers: tuple[ServerRef[OrmServer], ...] = ()
    balancer: ActorProxy[Balancer] | None = None


class RolloutServer(PoolMember, Protocol):
    """A rollout actor: draws groups, or parts of them, and evaluation samples, one at a time."""

    @ray.method
    def generate(self, task: GroupTask, context: RolloutContext) -> tuple[GroupInfo, Array, GroupPayload]:
        """Draws a group; see :func:`generate_group`."""
        ...

    @ray.method
    def merge(self, infos: Sequence[GroupInfo], *arrays: Array | GroupPayload) -> tuple[GroupInfo, Array, GroupPayload]:
        """Puts a group together that was drawn in parts; see :func:`merge_group`."""
        ...

    @ray.method
    def evaluate(self, prompts: Sequence[str], seeds: Sequence[int], context: RolloutContext) -> Array:
        """Deterministic samples, one a prompt and seed: latents ``[len(prompts), *latent]``."""
        ...

    @ray.method
    def receive(self, order: WeightOrder) -> None:
        """Takes part in a broadcast of weights."""
        ...

    @ray.method
    def sleep(self) -> None:
        """Leaves the GPU until the next group or evaluation."""
        ...


class PrmServer(PoolMember, Protocol):
    """A server of process rewards and their gradients."""

    @ray.method
    def reward_and_gradient(
        self,
        x: Array,
        sigma: float,
        conditioning: dict[str, Array],
        with_gradient: bool,
        prompt: str,
        deadline_s: float,
    ) -> PrmAnswer:
        """Rewards ``[samples]`` of states ``[samples, *latent]``, and their gradient if it is wanted."""
        ...

    @ray.method
    def load_weights(self, version: int, weights: dict[str, Array]) -> None:
        """Takes over refreshed weights."""
        ...

    @ray.method
    def weights_version(self) -> int:
        """Number of refreshes that the weights have been through; 0 after a restart."""
        ...


class OrmServer(PoolMember, Protocol):
    """A server of outcome rewards: decodes latents and scores the videos."""

    @ray.method
    def score(
        self, latents: Array, prompts: Sequence[str], deadline_s: float, optional: Sequence[str]
    ) -> tuple[OrmAnswer, float]:
        """Rewards by name, ``[samples]`` each, and the seconds that they took; optional ones that fail are missing."""
        ...

    @ray.method
    def videos(self, latents: Array) -> Videos:
        """Decoded latents, uint8 ``[batch, frames, height, width, 3]``."""
        ...


class Balancer(Protocol):
    """The load balancer: counts the outstanding requests of reward servers over all clients."""

    @ray.method
    def assign(self, ticket: str, servers: Sequence[str], near: Sequence[str], lifetime_s: float) -> str:
        """Gives a request to the server with the fewest, and counts it there; the server's name."""
        ...

    @ray.method
    def done(self, ticket: str) -> None:
        """Ends a request."""
        ...

    @ray.method
    def outstanding(self) -> dict[str, int]:
        """Number of outstanding requests, by the servers that have any."""
        ...


class PrmRefresher(PoolMember, Protocol):
    """Trains the process reward model on the policy's own samples while a run goes on.

    A restarted one raises LostActorError from ``add`` and ``step`` until ``restore`` is called.
    """

    @ray.method
    def restore(self, folder: str | None) -> int:
        """Goes back to a checkpoint's state, or to the start; the number of refreshes until then."""
        ...

    @ray.method
    def add(self, iteration: int, latents: Array, totals: Array, conditioning: dict[str, Array]) -> None:
        """Takes in a group."""
        ...

    @ray.method
    def begin(self, iteration: int) -> None:
        """Notes that an iteration is done, which a refresh may follow."""
        ...

    @ray.method
    def go_on(self, seconds: float) -> tuple[int, dict[str, float] | None]:
        """Trains for some seconds; refreshes so far, and metrics once nothing is left to train."""
        ...

    @ray.method
    def save(self, folder: str) -> None:
        """Writes model and samples; a refresh under way is given up, and noted as still to be done."""
        ...

    @ray.method
    def weights(self) -> dict[str, Array]:
        """All weights by name."""
        ...


class Mailbox(Protocol):
    """Between the run loop and the learner group, into which nobody can call."""

    @ray.method
    def set_checkpoint(self, folder: str | None, version: int) -> None:
        """Tells from where a starting learner group resumes, and which policy version that is."""
        ...

    @ray.method
    def submit(self, order: UpdateOrder, generation: int) -> bool:
        """Leaves an order; whether it was taken."""
        ...

    @ray.method
    def state(self, number: int, generation: int, timeout_s: float) -> LearnerState:
        """Waits until an order is reported or the group fails or has restarted; or for the timeout."""
        ...

    @ray.method
    def join(self, attempt: str, world_size: int) -> tuple[str | None, int]:
        """Called by every rank when it starts; the checkpoint to load, and its policy version."""
        ...

    @ray.method
    def learner_ready(self, attempt: str) -> None:
        """Called by rank 0 once the group can take orders."""
        ...

    @ray.method
    def lease(self, rank: int, attempt: str) -> UpdateOrder:
        """The next order; waits for one."""
        ...

    @ray.method
    def alive(self, attempt: str) -> None:
        """Called by rank 0 while it works on an order."""
        ...

    @ray.method
    def acknowledge(self, rank: int, attempt: str, report: UpdateReport) -> None:
        """Called by every rank when an order is done."""
        ...

    @ray.method
    def fail(self, attempt: str, reason: str) -> None:
        """Called by a rank that cannot go on and should not be restarted."""
        ...


class WeightDirectory(Protocol):
    """The weight store: knows where the published weights are."""

    @ray.method
    def put_bucket(
        self, version: int, kind: WeightKind, index: int, boxed: list[ObjectRef[Bucket]], keep: bool
    ) -> None:
        """Takes the reference to one bucket."""
        ...

    @ray.method
    def commit(self, manifest: WeightManifest) -> None:
        """Publishes a version, all of whose buckets have arrived."""
        ...

    @ray.method
    def fetch(self, version: int, kind: WeightKind) -> tuple[WeightManifest, list[ObjectRef[Bucket]]]:
        """Manifest and buckets of the newest weights that are at least of a version."""
        ...

    @ray.method
    def lost(self, version: int, kind: WeightKind) -> None:
        """Notes that a version's buckets cannot be had any more."""
        ...

    @ray.method
    def newest(self, kind: WeightKind) -> int:
        """Newest version of a kind; -1 if there is none."""
        ...


class Desk(Protocol):
    """The control desk: snapshots of a run one way, requests of the command line the other."""

    @ray.method
    def exchange(self, snapshot: RunSnapshot) -> list[dict[str, int]]:
        """Takes a snapshot; sizes of pools that were asked for since the last call."""
        ...

    @ray.method
    def status(self) -> tuple[RunSnapshot, float] | None:
        """The last snapshot and its age in seconds, or None before the first."""
        ...

    @ray.method
    def scale(self, sizes: dict[str, int]) -> RunSnapshot | None:
        """Asks for sizes of pools; the last snapshot."""
        ...


def named_actor(role: type[_T], name: str, namespace: str | None = None) -> ActorProxy[_T]:
    """Handle of a named actor: where a name becomes a typed handle.

    Args:
        role: what it answers to.
        name: of the actor.
        namespace: of the actor; None for the caller's own.

    Raises:
        ValueError: there is no such actor.
    """
    return cast("ActorProxy[_T]", ray.get_actor(name, namespace=namespace))


def start_actor(
    role: type[_T], cls: Callable[_P, object], options: Mapping[str, Any], *arguments: _P.args, **named: _P.kwargs
) -> ActorProxy[_T]:
    """Starts an actor of a class that keeps to a role's declaration.

    Args:
        role: what it answers to.
        cls: its class.
        options: Ray's, for example ``name``.
        arguments: of the class.
        named: of the class.
    """
    # Ray does not know the constructor's parameters; the signature here does.
    start = cast("Callable[_P, ActorProxy[_T]]", ray.remote(cast("type", cls)).options(**options).remote)
    return start(*arguments, **named)


def remote_task(work: Callable[_P, _T], options: Mapping[str, Any]) -> Callable[_P, ObjectRef[_T]]:
    """What calls a function in a process of its own.

    Args:
        work: the function.
        options: Ray's, for example what it reserves.
    """
    return cast("Callable[_P, ObjectRef[_T]]", ray.remote(work).options(**options).remote)


def kill_actor(actor: ActorProxy[_T], *, restart: bool) -> None:
    """Ends an actor's process; ``restart``: Ray starts it anew, if it may be restarted."""
    ray.kill(cast("ActorHandle[_T]", actor), no_restart=not restart)


# What is to be known of a group, its final latents ``[group, *latent]``, and its trained transitions; whoever makes the
# call owns all three, so they outlive the actor.
GroupRefs = tuple[ObjectRef[GroupInfo], ObjectRef[Array], ObjectRef[GroupPayload]]


def generate_group(actor: ActorProxy[RolloutServer], task: GroupTask, context: RolloutContext) -> GroupRefs:
    """Has a rollout actor draw a group, or a part of one, with a reference to each part of the answer."""
    # Ray's types know one reference a call.
    generate = cast(
        "Callable[[GroupTask, RolloutContext], GroupRefs]",
        cast("Any", actor).generate.options(num_returns=3).remote,
    )
    return generate(task, context)


def merge_group(
    actor: ActorProxy[RolloutServer],
    infos: Sequence[GroupInfo],
    latents: Sequence[ObjectRef[Array]],
    payloads: Sequence[ObjectRef[GroupPayload]],
) -> GroupRefs:
    """Has a rollout actor put a group together from its parts, in the order of their samples."""
    merge = cast("Callable[..., GroupRefs]", cast("Any", actor).merge.options(num_returns=3).remote)
    return merge(infos, *latents, *payloads)

"""Host memory and object store of the nodes, with the pools packed onto whole nodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from euphonium.wire.weights.store import KEPT_VERSIONS
from orchestrator.plan.fit import RoleFit
from orchestrator.plan.hardware import GIB, Hardware

# The order in which pools fill nodes: the group that must be together comes first.
PACKED = ("learner", "rollout", "prm", "prm_refresh", "orm")


@dataclass(frozen=True, kw_only=True)
class NodeUse:
    """What one node holds.

    Attributes:
        members: processes by role.
        host_gib: GiB of its memory, its object store included.
        store_gib: GiB in its object store.
    """

    members: dict[str, int]
    host_gib: float
    store_gib: float


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Bytes that travel through object stores.

    Attributes:
        iteration: trajectories of an iteration.
        publication: one version of the published weights.
        kinds: 2 with moving averages, which are published too, else 1.
        ahead: iterations that may be drawn before they are trained.
        groups_of_actor: share of the trajectories that one rollout actor draws.
    """

    iteration: float
    publication: float
    kinds: int
    ahead: int
    groups_of_actor: float


def place(fits: list[RoleFit], objects: Objects, hardware: Hardware) -> list[NodeUse]:
    """Fills nodes GPU by GPU; processes without a GPU share one further node."""
    by_role = {fit.role: fit for fit in fits}
    slots: list[tuple[str, float]] = []
    for role in PACKED:
        if role in by_role:
            share = by_role[role].memory.gpu_share
            slots += [(role, share)] * by_role[role].members
    nodes: list[list[str]] = []
    free = 0.0
    on_cpus = [role for role, share in slots if share == 0]
    for role, share in slots:
        if share == 0:
            continue
        if share > free + 1e-9:
            nodes.append([])
            free = float(hardware.gpus_per_node)
        nodes[-1].append(role)
        free -= share
    if on_cpus:
        nodes.append(on_cpus)
    return [_use(Counter(members), by_role, objects, first=members is nodes[0]) for members in nodes]


def _use(members: Counter[str], fits: dict[str, RoleFit], objects: Objects, *, first: bool) -> NodeUse:
    weights = objects.publication * objects.kinds
    stored = 0.0
    if members["learner"]:
        # Every rank trains on a part of every group.
        stored += objects.iteration
        if first:
            stored += (KEPT_VERSIONS + 1) * weights
    if members["rollout"]:
        stored += objects.groups_of_actor * members["rollout"] * (1 + objects.ahead)
        if not (members["learner"] and first):
            stored += weights
    held = sum(count * fits[role].host_gib for role, count in members.items())
    return NodeUse(members=dict(members), host_gib=held + stored / GIB, store_gib=stored / GIB)

"""The doctor's judgement of a node's facts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from euphonium.config import RunConfig
from orchestrator.deployment.findings import Finding, judged, passed
from orchestrator.deployment.node_facts import NodeFacts

GIB = 1 << 30
OPEN_FILES = 65_536
# Ray stops writing objects to a disk that is fuller.
FULL = 0.95
ROOMY_GIB = 20
CLOCK_S = 5.0
# Of these pools every member writes checkpoints.
WRITERS = ("learner", "prm_refresh")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: its id.
        name: its host's name and address.
        resources: what Ray gives out of it.
        labels: its labels.
        roles: pools of which it has room for a member.
    """

    id: str
    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    roles: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What nodes are compared with.

    Attributes:
        own: the facts of the driver's process.
        word: contents of the canary; None if there is none.
        config: the recipe, if there is one.
        since: when the nodes were asked, in seconds since 1970.
    """

    own: NodeFacts
    word: str | None
    config: RunConfig | None
    since: float


def judge_node(node: Node, facts: NodeFacts, expected: Expected) -> Iterator[Finding]:
    """Judges what a task has found on a node."""
    place, config = node.name, expected.config
    yield _versions(place, facts, expected.own)
    yield from _gpus(node, facts, config)
    yield from _memory_and_disk(node, facts)
    yield judged(
        "open files", place, f"limit {facts.open_files}", good=facts.open_files >= OPEN_FILES, otherwise="WARN",
        remedy=f"ulimit -n {OPEN_FILES} before ray start; in containers --ulimit nofile={OPEN_FILES}:{OPEN_FILES}",
    )  # fmt: skip
    # It was read at some time between the question and now.
    apart = max(expected.since - facts.clock, facts.clock - time.time(), 0.0)
    yield judged(
        "clock", place, f"{apart:.1f} s apart from here", good=apart < CLOCK_S, otherwise="WARN",
        remedy="set the clocks by NTP: logs and metrics of several nodes are read side by side",
    )  # fmt: skip
    if expected.word is not None and node.roles:
        yield _shared_folder(node, facts, expected.word)
    if config is not None and node.roles:
        yield judged(
            "weights", place,
            f"cannot read {', '.join(facts.unreadable)}" if facts.unreadable else "readable",
            good=not facts.unreadable, otherwise="FAIL",
            remedy="put them on storage that all nodes have under this path, or name a model of the hub",
        )  # fmt: skip


def _versions(place: str, facts: NodeFacts, own: NodeFacts) -> Finding:
    other = {
        name: (found, facts.versions.get(name, "none"))
        for name, found in own.versions.items()
        if facts.versions.get(name) != found
    }
    differing = ", ".join(f"{name} {there} (here {here})" for name, (here, there) in other.items())
    usual = ", ".join(f"{name} {facts.versions.get(name)}" for name in ("python", "ray", "torch"))
    return judged(
        "versions", place, differing or usual, good=not other, otherwise="FAIL",
        remedy="use the same image everywhere (deploy/gpu.Dockerfile), or requirements.lock",
    )  # fmt: skip


def _gpus(node: Node, facts: NodeFacts, config: RunConfig | None) -> Iterator[Finding]:
    place, roles, resources = node.name, node.roles, node.resources
    offered = resources.get("GPU", 0.0)
    kinds = ", ".join(sorted({f"{name}, {mib / 1024:.0f} GiB" for name, mib in facts.gpus}))
    if facts.gpus or offered:
        yield judged(
            "GPUs", place, f"the driver has {len(facts.gpus)} ({kinds or 'none'}), Ray gives out {offered:g}",
            good=len(facts.gpus) == offered, otherwise="WARN",
            remedy="start the container with --gpus=all, and Ray without --num-gpus",
        )  # fmt: skip
    stated = None if config is None else config.pools.gpu_memory_gib
    if stated is not None and facts.gpus and roles:
        least = min(mib for _, mib in facts.gpus) / 1024
        yield judged(
            "GPU memory", place, f"{least:.0f} GiB, the recipe plans with {stated:g}", good=least >= 0.95 * stated,
            otherwise="FAIL", remedy=f"pools.gpu_memory_gib={least:.0f}, and euphonium plan",
        )  # fmt: skip


def _memory_and_disk(node: Node, facts: NodeFacts) -> Iterator[Finding]:
    place, resources = node.name, node.resources
    total, free = (value / GIB for value in facts.shared_memory)
    store = resources.get("object_store_memory", 0.0) / GIB
    yield judged(
        "/dev/shm", place, f"{total:.1f} GiB, the object store may take {store:.1f}", good=total >= 0.98 * store,
        otherwise="WARN",
        remedy=f"give it {store:.0f} GiB (docker --shm-size, or an emptyDir in memory): else Ray takes the slow disk",
    )  # fmt: skip
    total, free = (value / GIB for value in facts.disk)
    detail = f"{free:.0f} of {total:.0f} GiB free where Ray keeps its session"
    remedy = "make room, or start Ray with --temp-dir and --object-spilling-directory on a larger disk"
    if free < (1 - FULL) * total:
        yield Finding("disk", place, "FAIL", detail, remedy)
    elif free < ROOMY_GIB:
        yield Finding("disk", place, "WARN", detail, remedy)
    else:
        yield passed("disk", place, detail)


def _shared_folder(node: Node, facts: NodeFacts, word: str) -> Finding:
    place, roles = node.name, node.roles
    writes = any(role in WRITERS for role in roles)
    return judged(
        "shared folder", place, "sees output_dir" if facts.read == word else "does not see what was written here",
        good=facts.read == word, otherwise="FAIL" if writes else "WARN",
        remedy="mount output_dir from storage that all nodes share, under one path: ranks write checkpoints there",
    )  # fmt: skip

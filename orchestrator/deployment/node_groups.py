"""Groups of like nodes for a recipe's pools: every manifest is made from this one table.

Pools with GPUs of their own get a group each (reward servers share one); pools that share GPUs, and a recipe without
GPUs, get one group for all.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.text_files import quoted
from orchestrator.deployment.pool_table import PoolRow, matches, pool_table

# Names of the groups are also the nodes' label ``pool``.
GROUP_OF = {"learner": "learner", "rollout": "rollout", "prm": "reward", "prm_refresh": "reward", "orm": "reward"}
ALL = "workers"
LABEL = "pool"
# Of the driver, and of Ray's own processes on the head.
HEAD_CPUS = 8
HEAD_GIB = 64
SHARED = "/shared"
METRICS_PORT = 9100


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node with GPUs, and what every target needs to know besides.

    Attributes:
        gpus: GPUs of a node.
        cpus: CPUs of a node.
        host_gib: GiB of its memory.
        store_gib: GiB of it for Ray's object store.
        image: container image of all roles.
        instance: type of cloud instance.
    """

    gpus: int = 8
    cpus: int = 96
    host_gib: float = 1000.0
    store_gib: float = 186.0
    image: str = "euphonium:latest"
    instance: str = "p5.48xlarge"


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Like nodes.

    Attributes:
        name: of the group.
        roles: the pools on it.
        nodes: how many the recipe needs.
        gpus: GPUs of a node; 0 without.
        cpus: CPUs of a node.
        host_gib: GiB of a node's memory.
        store_gib: GiB of it for Ray's object store.
        resources: custom resources that a node offers.
        labels: labels of a node.
    """

    name: str
    roles: tuple[str, ...]
    nodes: int
    gpus: int
    cpus: int
    host_gib: int
    store_gib: int
    resources: dict[str, int] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def most_nodes(self) -> int:
        """As many as ``euphonium scale`` may let it grow to."""
        return 2 * self.nodes


def node_groups(config: RunConfig, machine: Machine, shared_gpus: int) -> list[NodeGroup]:
    """The groups of a recipe.

    Args:
        config: the recipe.
        machine: a node.
        shared_gpus: GPUs that all pools fill, where they share them.

    Raises:
        ConfigError: labels of pools of one group contradict each other.
    """
    rows = pool_table(config)
    if not any(row.share.num_gpus for row in rows):
        cpus = math.ceil(sum(row.demand("CPU") for row in rows))
        return [_group(ALL, rows, machine, nodes=1, gpus=0, cpus=max(cpus, 1))]
    if any(0 < row.share.num_gpus < 1 for row in rows):
        nodes = math.ceil(shared_gpus / machine.gpus)
        return [_group(ALL, rows, machine, nodes=nodes, gpus=min(machine.gpus, shared_gpus), cpus=machine.cpus)]
    found = []
    for name in dict.fromkeys(GROUP_OF[row.role] for row in rows):
        members = [row for row in rows if GROUP_OF[row.role] == name]
        gpus = int(sum(row.demand("GPU") for row in members))
        nodes = max(1, math.ceil(gpus / machine.gpus))
        found.append(_group(name, members, machine, nodes=nodes, gpus=min(machine.gpus, gpus), cpus=machine.cpus))
    return found


def _group(name: str, rows: Sequence[PoolRow], machine: Machine, *, nodes: int, gpus: int, cpus: int) -> NodeGroup:
    host, store = (machine.host_gib, machine.store_gib) if gpus else (max(16.0, 4.0 * cpus), max(4.0, float(cpus)))
    return NodeGroup(
        name=name, roles=tuple(row.role for row in rows), nodes=nodes, gpus=gpus, cpus=cpus, host_gib=int(host),
        store_gib=int(store), resources=_offered(rows, nodes, gpus), labels=_labels(name, rows),
    )  # fmt: skip


def _offered(rows: Sequence[PoolRow], nodes: int, gpus: int) -> dict[str, int]:
    """Custom resources of a node: one a member by the pool's name, and what the recipe asks for by other names."""
    offered = {}
    for row in rows:
        offered[row.role] = max(1, int(gpus / row.share.num_gpus)) if row.share.num_gpus else row.members
    for name in {name for row in rows for name in row.share.resources}:
        wanted = sum(row.demand(name) for row in rows)
        # The cluster launcher takes whole numbers only.
        offered[name] = max(offered.get(name, 0), math.ceil(wanted / nodes))
    return offered


def _labels(name: str, rows: Sequence[PoolRow]) -> dict[str, str]:
    labels = {LABEL: name}
    for row in rows:
        labels |= {
            key: value for key, value in row.share.labels.items() if value and not value.startswith(("!", "in("))
        }
    for row in rows:
        if not matches(row.share.labels, labels):
            raise ConfigError(
                f"pools.{row.role}.labels: {row.share.labels} do not go with the other pools on the nodes of "
                f"{quoted(name)}, {labels}: leave them out, and the manifest places the pools itself"
            )
    return labels


def placement(config: RunConfig, groups: Sequence[NodeGroup]) -> list[str]:
    """Overrides that lay the pools onto their groups; none where the recipe does that itself, or there is one group."""
    if len(groups) == 1:
        return []
    shares = {row.role: row.share for row in pool_table(config)}
    found = []
    for group in groups:
        for role in group.roles:
            # Without settings of its own the refresh takes those of a PRM server.
            inherits = role == "prm_refresh" and config.pools.prm_refresh is None
            if not (shares[role].labels or shares[role].resources or inherits):
                found.append(f"pools.{role}.labels={{{LABEL}: {group.labels[LABEL]}}}")
    return found


def train_command(
    config: RunConfig, recipe: Path, overrides: Sequence[str], groups: Sequence[NodeGroup], *further: str
) -> str:
    """The command of the driver, for a shell: the recipe, its overrides, placement, and runs on the shared storage."""
    output = [] if config.output_dir.is_absolute() else [f"output_dir={SHARED}/{config.output_dir}"]
    settings = [*overrides, *output, *placement(config, groups), *further]
    return shlex.join(["python", "-m", "orchestrator", "train", str(recipe), *settings])

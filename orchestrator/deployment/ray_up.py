"""The cluster launcher's file, for ``ray up``, on AWS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from orchestrator.deployment.node_groups import HEAD_GIB, Machine, NodeGroup

HEAD_INSTANCE = "m7i.4xlarge"
_START = "RAY_AUTH_MODE=token ray start"


def ray_up(name: str, command: str, groups: Sequence[NodeGroup], machine: Machine) -> str:
    """The file's text.

    Args:
        name: name of the cluster.
        command: the driver's command.
        groups: nodes.
        machine: image and instance type.
    """
    text = yaml.safe_dump(_cluster(name, groups, machine), sort_keys=False, width=110)
    return (
        "# Made by euphonium render --to ray-up. For ray up: a head without GPUs and a node type a group of pools,\n"
        "# each scaling on its own. Before use set region, image and instance types, and mount storage that all nodes\n"
        "# share at /shared.\n"
        "#\n"
        "#   umask 077; ray get-auth-token --generate     # once; the cluster asks for this token\n"
        "#   ray up CLUSTER.yaml; ray dashboard CLUSTER.yaml\n"
        "#   euphonium submit RECIPE ...\n"
        "#\n"
        f"# The recipe's command: {command}\n"
        f"{text}"
    )


def _cluster(name: str, groups: Sequence[NodeGroup], machine: Machine) -> dict[str, Any]:
    shared_memory = max(group.store_gib for group in groups)
    return {
        "cluster_name": name,
        "max_workers": sum(group.most_nodes for group in groups),
        "upscaling_speed": 1.0,
        # Nodes load tens of gigabytes before they are useful: they are not given back at the first lull.
        "idle_timeout_minutes": 30,
        "provider": {"type": "aws", "region": "us-east-1", "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": machine.image,
            "container_name": "euphonium",
            "run_options": [f"--shm-size={HEAD_GIB // 2}g", "--ulimit nofile=65536:65536"],
            "worker_run_options": [
                *(["--gpus=all"] if any(group.gpus for group in groups) else []),
                f"--shm-size={shared_memory}g",
                "--ulimit nofile=65536:65536",
            ],
        },
        "available_node_types": {
            # No work on the head but the driver: an actor that eats its memory would take the cluster down.
            "head": {
                "node_config": {"InstanceType": HEAD_INSTANCE},
                "resources": {"CPU": 0},
                "labels": {"pool": "head"},
                "max_workers": 0,
            },
            **{group.name: _node_type(group, machine) for group in groups},
        },
        "head_node_type": "head",
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "rsync_exclude": ["**/.git", "**/.venv", "**/runs", "**/__pycache__"],
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_START} --address=$RAY_HEAD_IP:6379"],
    }


def _node_type(group: NodeGroup, machine: Machine) -> dict[str, Any]:
    gpus = {"GPU": machine.gpus} if group.gpus else {}
    return {
        "node_config": {"InstanceType": machine.instance if group.gpus else HEAD_INSTANCE},
        "resources": {"CPU": group.cpus, **gpus, **group.resources},
        "labels": group.labels,
        "min_workers": group.nodes,
        "max_workers": group.most_nodes,
    }

"""Descriptions of the cluster's resources, and of what the autoscaler is doing, for messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus


def free_resources(demand: Mapping[str, float]) -> str:
    """What the pools reserve and what the cluster has: one clause a resource."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return "; ".join(
        f"{name}: the pools reserve {amount:g}, the cluster has {total.get(name, 0):g}, {free.get(name, 0):g} free"
        for name, amount in sorted(demand.items())
    )


def lacking_resources(demand: Mapping[str, float]) -> str:
    """The resources of a demand of which the cluster has too little free, in words; empty if it has enough."""
    import ray

    free = ray.available_resources()
    short = {name: amount for name, amount in demand.items() if amount > free.get(name, 0.0) + 1e-6}
    return free_resources(short) if short else ""


def beyond_the_cluster(demand: Mapping[str, float]) -> str:
    """The resources of a demand of which the whole cluster has too little, in words; empty if it has enough."""
    import ray

    total = ray.cluster_resources()
    short = {name: amount for name, amount in demand.items() if amount > total.get(name, 0.0) + 1e-6}
    return free_resources(short) if short else ""


def autoscaler_says() -> str:
    """What the cluster's autoscaler is doing, in words; empty if there is none."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=10)
    # Version 0 means that there is no autoscaler.
    if not int(status.stats.autoscaler_version or 0):
        return ""
    return describe_autoscaler(status)


def describe_autoscaler(status: ClusterStatus) -> str:
    """One clause on the nodes that are being started, and on those that failed to start."""
    coming: dict[str, int] = {}
    for launch in status.pending_launches:
        coming[launch.ray_node_type_name] = coming.get(launch.ray_node_type_name, 0) + launch.count
    for node in status.pending_nodes:
        coming[node.ray_node_type_name] = coming.get(node.ray_node_type_name, 0) + 1
    failed = [f"{launch.ray_node_type_name} ({launch.details})" for launch in status.failed_launches]
    failed += [f"{node.ray_node_type_name} ({node.failure_detail or node.details})" for node in status.failed_nodes]
    starts = ", ".join(f"{count} x {name}" for name, count in sorted(coming.items())) or "no node"
    return f"the autoscaler is starting {starts}" + (f" and failed to start {', '.join(failed)}" if failed else "")

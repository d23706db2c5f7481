"""KubeRay's manifests: a RayJob that trains once, or a RayCluster for jobs that are submitted to it.

A failed RayJob is tried again on a new cluster, where the run goes on from its newest checkpoint on the shared volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from orchestrator.deployment.jobs import runtime_environment
from orchestrator.deployment.node_groups import HEAD_CPUS, HEAD_GIB, METRICS_PORT, SHARED, Machine, NodeGroup

API = "ray.io/v1"
RETRIES = 3
IDLE_S = 1800
CLAIM = "euphonium-shared"
SECRET = "euphonium-secrets"
USER = 1000
_NOTE = (
    "# Made by euphonium render. Needs KubeRay 1.7, a ReadWriteMany claim '" + CLAIM + "' for runs and weights,\n"
    "# and, if models of the hub ask for it, a secret '" + SECRET + "' with HF_TOKEN. The cluster asks for a token,\n"
    "# which KubeRay makes.\n"
)


def ray_job(name: str, command: str, groups: Sequence[NodeGroup], machine: Machine) -> str:
    """A RayJob's text."""
    manifest = {
        "apiVersion": API,
        "kind": "RayJob",
        "metadata": _metadata(name),
        "spec": {
            "entrypoint": command,
            "runtimeEnvYAML": yaml.safe_dump(runtime_environment()),
            "submissionMode": "K8sJobMode",
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "rayClusterSpec": _cluster(groups, machine),
        },
    }
    return _NOTE + yaml.safe_dump(manifest, sort_keys=False, width=1000)


def ray_cluster(name: str, command: str, groups: Sequence[NodeGroup], machine: Machine) -> str:
    """A RayCluster's text."""
    manifest = {"apiVersion": API, "kind": "RayCluster", "metadata": _metadata(name), "spec": _cluster(groups, machine)}
    return _NOTE + f"# The recipe's command: {command}\n" + yaml.safe_dump(manifest, sort_keys=False, width=1000)


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app.kubernetes.io/name": "euphonium", "app.kubernetes.io/instance": name}}


def _cluster(groups: Sequence[NodeGroup], machine: Machine) -> dict[str, Any]:
    ports = {"gcs": 6379, "dashboard": 8265, "run-metrics": METRICS_PORT}
    head = _container("head", machine.image, {"cpu": HEAD_CPUS, "memory": f"{HEAD_GIB}Gi"})
    head["ports"] += [{"name": name, "containerPort": port} for name, port in ports.items()]
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_S},
        "headGroupSpec": {
            # The dashboard is reached by KubeRay and asks for the token; no work on the head but the driver.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(head, HEAD_GIB // 2, gpus=0),
        },
        "workerGroupSpecs": [_workers(group, machine) for group in groups],
    }


def _workers(group: NodeGroup, machine: Machine) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": group.cpus, "memory": f"{group.host_gib}Gi"}
    if group.gpus:
        amounts["nvidia.com/gpu"] = group.gpus
    resources = (
        {"resources": {name: str(amount) for name, amount in group.resources.items()}} if group.resources else {}
    )
    return {
        "groupName": group.name,
        "replicas": group.nodes,
        "minReplicas": group.nodes,
        "maxReplicas": group.most_nodes,
        "idleTimeoutSeconds": IDLE_S,
        "labels": group.labels,
        **resources,
        "rayStartParams": {"object-store-memory": str(group.store_gib << 30)},
        "template": _pod(_container("worker", machine.image, amounts), group.store_gib, gpus=group.gpus),
    }


def _container(name: str, image: str, amounts: dict[str, Any]) -> dict[str, Any]:
    # Ray takes what the limits say; requests below them would have pods evicted in the middle of an iteration.
    return {
        "name": f"ray-{name}",
        "image": image,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "ports": [{"name": "metrics", "containerPort": 8080}],
        "envFrom": [{"secretRef": {"name": SECRET, "optional": True}}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "shared", "mountPath": SHARED},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "session", "mountPath": "/tmp/ray"},
        ],
    }


def _pod(container: dict[str, Any], store_gib: int, *, gpus: int) -> dict[str, Any]:
    tolerations = {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "euphonium"}},
        "spec": {
            "securityContext": {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"},
            **(tolerations if gpus else {}),
            "containers": [container],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": CLAIM}},
                # The object store; it counts as the pod's memory.
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{store_gib + 2}Gi"}},
                # Logs, and objects that do not fit the store.
                {"name": "session", "emptyDir": {}},
            ],
        },
    }

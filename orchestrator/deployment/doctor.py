"""``euphonium doctor``: looks at a cluster and at every node of it, by a task each, and judges what it finds.

Waits for: the cluster (it answers within seconds, or the report ends there); a node's task (``NODE_TIMEOUT_S``); the
measurements of orchestrator/deployment/links.py.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from euphonium.config import RunConfig
from euphonium.errors import PreflightError
from orchestrator.deployment.findings import Finding, judged, passed
from orchestrator.deployment.links import measure_links
from orchestrator.deployment.node_checks import Expected, Node, judge_node
from orchestrator.deployment.node_facts import collect
from orchestrator.deployment.pool_table import PoolRow, pool_table
from orchestrator.pools.ray_session import join_ray, one_line

NODE_TIMEOUT_S = 60.0
TOKEN_FILE = Path("~/.ray/auth_token")
SESSION = "/tmp/ray"


def examine(config: RunConfig | None) -> list[Finding]:
    """Looks at the cluster that RAY_ADDRESS names, or that of this machine.

    Args:
        config: the recipe that is to run there, with absolute paths; None looks at the cluster alone.
    """
    rows = [] if config is None else pool_table(config)
    try:
        join_ray()
    except PreflightError as error:
        remedy = "ray start --head, or name the cluster in RAY_ADDRESS=HOST:6379"
        return [Finding("cluster", "cluster", "FAIL", str(error), remedy), *_of_this_machine(config)]
    import ray

    try:
        nodes = _nodes(rows)
        findings = [passed("cluster", "cluster", f"{len(nodes)} node(s), Ray {ray.__version__}"), *_exposure()]
        findings += _of_this_machine(config)
        findings += [_room(row, nodes) for row in rows] + _totals(rows, nodes)
        findings += _node_findings(config, rows, nodes)
        on_gpus = any(row.role == "learner" and row.share.num_gpus for row in rows)
        at_work = {node.id: node.resources for node in nodes if node.roles or not rows}
        if at_work:
            findings += measure_links(at_work, on_gpus=on_gpus)
        return findings
    finally:
        ray.shutdown()


def _nodes(rows: Sequence[PoolRow]) -> list[Node]:
    import ray

    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources, labels = dict(node["Resources"]), dict(node.get("Labels") or {})
            roles = tuple(row.role for row in rows if row.room_on(resources, labels))
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            found.append(Node(id=node["NodeID"], name=name, resources=resources, labels=labels, roles=roles))
    names = [node.name for node in found]
    return [
        node if names.count(node.name) == 1 else Node(**{**vars(node), "name": f"{node.name} {node.id[:6]}"})
        for node in sorted(found, key=lambda node: (node.name, node.id))
    ]


def _exposure() -> list[Finding]:
    """Whether others can get at the cluster: its token, and where its dashboard listens."""
    import ray
    from ray._private.worker import get_dashboard_url

    from orchestrator.pools.ray_session import asks_for_token

    token = asks_for_token(ray.get_runtime_context().gcs_address)
    findings = [
        judged(
            "token", "cluster", "asked for" if token else "none: who reaches the cluster runs code on it",
            good=token, otherwise="WARN",
            remedy="ray get-auth-token --generate, and RAY_AUTH_MODE=token before every ray start",
        )
    ]  # fmt: skip
    url = get_dashboard_url() or ""
    host = url.rpartition("://")[2].rpartition(":")[0]
    here_only = host in ("127.0.0.1", "localhost", "::1", "[::1]")
    if url:
        findings.append(
            judged(
                "dashboard", "cluster", f"listens on {url}", good=here_only or token, otherwise="FAIL",
                remedy="start the head with --dashboard-host=127.0.0.1, or with a token: jobs are code",
            )
        )  # fmt: skip
    file = TOKEN_FILE.expanduser()
    if token and file.is_file():
        private = not file.stat().st_mode & 0o077
        detail = f"{file} is {'yours alone' if private else 'readable by others'}"
        findings.append(
            judged("token file", "here", detail, good=private, otherwise="WARN", remedy=f"chmod 600 {file}")
        )
    return findings


def _of_this_machine(config: RunConfig | None) -> list[Finding]:
    """The port of the run's metrics, which the driver opens."""
    if config is None or not config.metrics.prometheus_port:
        return []
    place = (config.metrics.prometheus_host, config.metrics.prometheus_port)
    try:
        with socket.create_server(place):
            return [passed("metrics port", "here", f"{place[0]}:{place[1]} is free")]
    except OSError as error:
        detail = f"{place[0]}:{place[1]}: {error.strerror}"
        return [Finding("metrics port", "here", "FAIL", detail, "metrics.prometheus_port=0 takes any free port")]


def _room(row: PoolRow, nodes: Sequence[Node]) -> Finding:
    room = sum(row.room_on(node.resources, node.labels) for node in nodes)
    takes = ", ".join(f"{name} {amount:g}" for name, amount in row.share.reserved.items()) or "nothing"
    labelled = "".join(f", {name}={value}" for name, value in row.share.labels.items())
    return judged(
        f"pool {row.role}", "cluster", f"{row.members} members of {takes}{labelled}; room for {room}",
        good=room >= row.members, otherwise="FAIL",
        remedy=f"add nodes that offer this (ray start --resources, --labels), or change pools.{row.role}; with an "
        "autoscaler, nodes may still come",
    )  # fmt: skip


def _totals(rows: Sequence[PoolRow], nodes: Sequence[Node]) -> list[Finding]:
    findings = []
    for name in sorted({name for row in rows for name in row.share.reserved}):
        wanted = sum(row.demand(name) for row in rows)
        has = sum(node.resources.get(name, 0.0) for node in nodes)
        findings.append(
            judged(
                name, "cluster", f"the pools take {wanted:g}, the cluster has {has:g}", good=has >= wanted - 1e-6,
                otherwise="FAIL", remedy="add nodes, or make pools smaller",
            )
        )  # fmt: skip
    return findings


def _node_findings(config: RunConfig | None, rows: Sequence[PoolRow], nodes: Sequence[Node]) -> Iterator[Finding]:
    import ray

    # Of a path that is not here the driver knows no more than that it is a model of the hub.
    needed = {row.role: [path for path in row.reads if os.path.isabs(path)] for row in rows}
    own = collect(SESSION, None, [])
    with _canary(config) as (canary, word):
        task = ray.remote(num_cpus=0, max_retries=0)(collect)
        began = time.time()
        calls = [
            task.options(scheduling_strategy=_on(node.id)).remote(
                SESSION, canary, sorted({path for role in node.roles for path in needed[role]})
            )
            for node in nodes
        ]
        for node, call in zip(nodes, calls, strict=True):
            try:
                facts = ray.get(call, timeout=max(1.0, began + NODE_TIMEOUT_S - time.time()))
            except Exception as error:  # a node that cannot run the task is the finding
                yield Finding(
                    "task", node.name, "FAIL", f"ran no task ({one_line(error)})",
                    "install this version there (deploy/gpu.Dockerfile); see the node's logs in Ray's dashboard",
                )  # fmt: skip
                continue
            yield from judge_node(node, facts, Expected(own=own, word=word, config=config, since=began))


@contextmanager
def _canary(config: RunConfig | None) -> Iterator[tuple[str | None, str | None]]:
    """A file where the runs go, which every node has to see: its path and contents."""
    if config is None:
        yield None, None
        return
    file, word = config.output_dir / f".doctor-{uuid.uuid4().hex}", uuid.uuid4().hex
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(word, encoding="utf-8")
    try:
        yield str(file), word
    finally:
        file.unlink(missing_ok=True)


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)

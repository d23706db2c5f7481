"""The connection to Ray: joining or starting a cluster, its token, remains of earlier runs, actors of the driver."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import psutil

from euphonium.errors import PreflightError
from euphonium.wire.deadlines import node_id

# Of a run's namespace; its name follows.
NAMESPACE = "euphonium-"
# Name of the control desk's actor.
CONTROL = "control"
LEFTOVERS_TIMEOUT_S = 60.0


def connect_ray(namespace: str, *, verbose: bool) -> None:
    """Joins the cluster that RAY_ADDRESS names or that ``ray start`` started on this machine, or starts one here.

    A cluster that another program started for itself is not joined: it ends with that program.

    Args:
        namespace: namespace of the run's actors.
        verbose: whether to print what the actors log; it is in Ray's log files and dashboard in any case.
    """
    _quiet_ray()
    _follow_authentication([os.environ.get("RAY_ADDRESS", "")])
    import ray

    options: dict[str, Any] = {"namespace": namespace, "logging_level": logging.WARNING, "log_to_driver": verbose}
    try:
        ray.init(**options)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        # Ray still has the address of a cluster that has ended.
        ray.init(address="local", **options)


def join_ray() -> None:
    """Joins the cluster that runs on this machine or that the environment names.

    Raises:
        PreflightError: there is none.
    """
    _quiet_ray()
    named = os.environ.get("RAY_ADDRESS")
    _follow_authentication([named] if named else _clusters_here())
    import ray

    try:
        ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except ray.exceptions.AuthenticationError as error:
        raise PreflightError(
            "the cluster asks for a token: put it into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except ConnectionError as error:
        raise PreflightError(
            "no Ray cluster is running on this machine, and RAY_ADDRESS names none: is the job running?"
        ) from error


def _clusters_here() -> list[str]:
    """Addresses of the Ray clusters that run on this machine."""
    flag = "--gcs-address="
    words = itertools.chain.from_iterable(p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
    return sorted({word.removeprefix(flag) for word in words if word.startswith(flag)})


def _follow_authentication(addresses: Sequence[str]) -> None:
    """Makes Ray send its token if a cluster asks for one, as clusters do that a run started itself.

    Otherwise Ray would try for 20 s without one, and then not say why it failed. It reads the variable when it is
    imported.
    """
    if os.environ.get("RAY_AUTH_MODE") is None and any(map(_asks_for_a_token, addresses)):
        os.environ["RAY_AUTH_MODE"] = "token"


def _asks_for_a_token(address: str) -> bool:
    import grpc

    if not re.fullmatch(r"[^/]+:[0-9]+", address):
        return False
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=5)
        except grpc.RpcError as error:
            # Other errors will show when the cluster is joined.
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _quiet_ray() -> None:
    """Silences notices of Ray that are meant for authors of Ray programs."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A failed call with several results would be reported once for each that is not awaited.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # That a local cluster asks for its token is what we want, and what SECURITY.md says.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def beside_the_driver() -> dict[str, Any]:
    """Options of small actors such as the mailbox: on the driver's node, without which the run has ended anyway."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own_node = NodeAffinitySchedulingStrategy(node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": own_node}


async def name_is_free(name: str) -> None:
    """Waits until no actor of an earlier run of this name is left; after a kill, Ray takes a moment to remove them.

    Raises:
        PreflightError: a run of this name is still running in this cluster.
    """
    import ray

    deadline = time.monotonic() + LEFTOVERS_TIMEOUT_S
    while names := ray.util.list_named_actors():
        if time.monotonic() > deadline:
            raise PreflightError(
                f"a run named {name} is running in this cluster ({', '.join(sorted(names))}): "
                "stop it, or take another name=..."
            )
        await asyncio.sleep(0.5)

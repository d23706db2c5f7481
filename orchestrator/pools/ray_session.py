"""The connection to Ray: joining or starting a cluster, its token, remains of earlier runs, actors of the driver."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from euphonium.errors import PreflightError
from euphonium.text_files import shown
from euphonium.wire.deadlines import node_id

# Of a run's namespace; its name follows.
NAMESPACE = "euphonium-"
# Name of the control desk's actor.
CONTROL = "control"
LEFTOVERS_TIMEOUT_S = 60.0
REACH_TIMEOUT_S = 15.0
NONE_RUNS = "no Ray cluster is running on this machine, and RAY_ADDRESS names none: is the job running?"


def connect_ray(namespace: str, *, verbose: bool) -> None:
    """Joins the cluster that RAY_ADDRESS names or that ``ray start`` started on this machine, or starts one here.

    A cluster that another program started for itself is not joined: it ends with that program.

    Args:
        namespace: namespace of the run's actors.
        verbose: whether to print what the actors log; it is in Ray's log files and dashboard in any case.

    Raises:
        PreflightError: the cluster that RAY_ADDRESS names does not answer, or Ray could not be started here.
    """
    _quiet_ray()
    named = os.environ.get("RAY_ADDRESS", "")
    reach_cluster(named)
    options: dict[str, Any] = {"namespace": namespace, "logging_level": logging.WARNING, "log_to_driver": verbose}
    if not named and (noted := _noted_cluster()) and not _answers(noted):
        options["address"] = "local"
    import ray

    try:
        ray.init(**options)
    except ConnectionError as error:
        if named:
            raise PreflightError(_unreachable(named, one_line(error))) from error
        # Ray still has the address of a cluster that has ended since.
        _start_here(options | {"address": "local"})
    except Exception as error:  # Ray raises bare exceptions where its processes do not come up
        raise PreflightError(_not_started(named, error)) from error


def _start_here(options: Mapping[str, Any]) -> None:
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        raise PreflightError(_not_started("", error)) from error


def join_ray() -> None:
    """Joins the cluster that runs on this machine or that the environment names.

    Raises:
        PreflightError: there is none, or it does not answer.
    """
    _quiet_ray()
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        reach_cluster(address)
    else:
        known = [place for place in (_noted_cluster(), *_clusters_here()) if place]
        address = next(filter(_answers, known), "")
        if not address:
            raise PreflightError(NONE_RUNS)
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ray.exceptions.AuthenticationError as error:
        raise PreflightError(
            "the cluster asks for a token: put it into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except ConnectionError as error:
        raise PreflightError(NONE_RUNS) from error
    except Exception as error:
        raise PreflightError(_not_started(address, error)) from error


def reach_cluster(address: str) -> None:
    """Checks that the cluster at an address answers, because Ray itself would try for ever.

    Makes Ray send its token if the cluster asks for one, as clusters do that a run started itself: Ray reads the
    variable for it when it is imported.

    Args:
        address: a cluster's ``host:port``; of other forms of address nothing is checked.

    Raises:
        PreflightError: nothing at this address has answered as a cluster within ``REACH_TIMEOUT_S``.
    """
    if not re.fullmatch(r"[^/]+:[0-9]+", address):
        return
    deadline = time.monotonic() + REACH_TIMEOUT_S
    while (answer := _asked(address)) not in ("answers", "asks for a token"):
        if time.monotonic() > deadline:
            raise PreflightError(_unreachable(address, answer))
        # Its head may be about to start.
        time.sleep(0.5)
    if answer == "asks for a token":
        _send_token()


def _noted_cluster() -> str:
    """Address that ``ray start`` noted on this machine, and that Ray joins by itself; the cluster may have ended."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return note.read_text().strip() if note.is_file() else ""


def _answers(address: str) -> bool:
    """Whether a cluster answers at an address; makes Ray send its token if it asks for one."""
    answer = _asked(address)
    if answer == "asks for a token":
        _send_token()
    return answer in ("answers", "asks for a token")


def _clusters_here() -> list[str]:
    """Addresses of the Ray clusters that run on this machine."""
    flag = "--gcs-address="
    words = itertools.chain.from_iterable(p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
    return sorted({word.removeprefix(flag) for word in words if word.startswith(flag)})


def asks_for_token(address: str) -> bool:
    """Whether the cluster at an address lets in only those who send its token."""
    return _asked(address) == "asks for a token"


def _send_token() -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def _asked(address: str) -> str:
    """What comes of asking the cluster at an address who it is: ``answers``, ``asks for a token``, or why it does not.

    Returns within 5 s.
    """
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=5)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return "asks for a token"
            return one_line(error.details() or error.code().name)
    return "answers"


def _unreachable(address: str, why: str) -> str:
    return (
        f"RAY_ADDRESS: no Ray cluster answers at {address} ({why}): start it, correct the address, or unset the "
        "variable to use this machine"
    )


def _not_started(address: str, error: Exception) -> str:
    what = (
        f"RAY_ADDRESS: the Ray cluster at {address} cannot be joined"
        if address
        else "Ray did not start on this machine"
    )
    return (
        f"{what} ({one_line(error)}): see its log files in /tmp/ray/session_latest/logs; an overloaded machine, a full "
        "disk and another version of Ray are common reasons"
    )


def one_line(text: object) -> str:
    """An error's text on one line, cut where it is long."""
    return shown(" ".join(str(text).split()), 300)


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

"""Jobs of a Ray cluster through its dashboard's HTTP interface: where it is, submitting, following, how one ended."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from euphonium.errors import ConfigError, EuphoniumError, PreflightError, ResourcesError, TrainingError
from euphonium.text_files import quoted
from orchestrator.pools.ray_session import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
REACH_TIMEOUT_S = 15.0
# Longest wait for a dashboard that has answered before.
LOST_TIMEOUT_S = 120.0
# Between SIGTERM, on which a run writes a checkpoint, and SIGKILL. Ray's own default is 3.
STOP_WAIT_S = 300
# Statuses of failed commands; a driver that ends with another one was ended from outside.
OWN_STATUSES = range(1, 7)


def runtime_environment() -> dict[str, Any]:
    """What every job of ours needs of Ray, by the fields of ``runtime_env``; no secret belongs into it."""
    return {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job to submit.

    Attributes:
        name: first part of its id.
        entrypoint: its command, for a shell.
        folder: working tree that is packed and sent.
        metadata: what the dashboard shows of it.
    """

    name: str
    entrypoint: str
    folder: Path
    metadata: Mapping[str, str]


def dashboard_address(given: str | None) -> str:
    """Address of the cluster's dashboard: as given, by the environment, or this machine's.

    Raises:
        ConfigError: it is no HTTP address.
    """
    ray_address = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get(ADDRESS_VARIABLE) or (ray_address if "://" in ray_address else DEFAULT_ADDRESS)
    place = urlsplit(address)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ConfigError(
            f"--address {quoted(address)}: give the address of Ray's dashboard, such as {DEFAULT_ADDRESS}"
        )
    return address.rstrip("/")


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster with a dashboard at an address; ends within seconds if there is none.

    Raises:
        PreflightError: nothing answers there, or it asks for a token that is not here.
    """
    if _status_of(f"{address}/api/version") in (401, 403):
        # Ray reads it when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # The variable goes before the argument.
    os.environ[ADDRESS_VARIABLE] = address
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError as error:
        raise PreflightError(
            f"{address} asks for a token: put it into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except Exception as error:  # Ray raises bare exceptions here
        raise PreflightError(f"{address} takes no jobs ({one_line(error)}): is it Ray's dashboard?") from error


def _status_of(url: str) -> int:
    """HTTP status of an address that answers.

    Raises:
        PreflightError: nothing has answered within ``REACH_TIMEOUT_S``.
    """
    deadline = time.monotonic() + REACH_TIMEOUT_S
    while True:
        try:
            # The scheme has been checked.
            with urllib.request.urlopen(url, timeout=5) as answer:  # nosec B310
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, ValueError) as error:
            why: object = getattr(error, "reason", error)
            if time.monotonic() > deadline:
                raise PreflightError(
                    f"no Ray dashboard answers at {url.removesuffix('/api/version')} ({one_line(why)}): start the "
                    f"cluster, forward its port (ssh -L 8265:127.0.0.1:8265 HEAD, or ray dashboard CLUSTER.yaml), or "
                    f"give another --address"
                ) from error
        time.sleep(0.5)


def submit(client: JobSubmissionClient, job: Job) -> str:
    """Packs the working tree and submits a job; returns its id.

    Raises:
        PreflightError: the cluster did not take it.
    """
    try:
        return str(
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env={"working_dir": str(job.folder), **runtime_environment()},
                metadata=dict(job.metadata),
            )
        )
    except (RuntimeError, ValueError) as error:
        raise PreflightError(
            f"the cluster did not take the job ({one_line(error)}); what of {job.folder} is not needed there goes into "
            ".rayignore"
        ) from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
    """Passes on what a job prints until it has ended; connects anew where the connection breaks.

    Raises:
        PreflightError: the dashboard is gone.
    """
    asyncio.run(_follow(client, job, write))


async def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
    from aiohttp import ClientError

    written = 0
    answered = time.monotonic()
    while True:
        seen = 0
        try:
            # Every connection begins with the first line.
            async for text in client.tail_job_logs(job):
                new = text[max(0, written - seen) :]
                seen += len(text)
                answered = time.monotonic()
                if new:
                    write(new)
                    written = seen
            if client.get_job_status(job).is_terminal():
                return
            answered = time.monotonic()
        # RuntimeError: a connection that broke in the middle.
        except (RuntimeError, OSError, ClientError) as error:
            if time.monotonic() - answered > LOST_TIMEOUT_S:
                raise PreflightError(
                    f"Ray's dashboard has not answered for {LOST_TIMEOUT_S:.0f} s ({one_line(error)}): if the head is "
                    "lost, so is the job; on a new cluster the same command goes on from its newest checkpoint"
                ) from error
        await asyncio.sleep(1)


def outcome(client: JobSubmissionClient, job: str) -> None:
    """Raises what a job ended with, as an error with the exit status of its driver; returns if it is done or stopped.

    Raises:
        EuphoniumError: it failed.
    """
    info = client.get_job_info(job)
    if info.status != "FAILED":
        return
    status, kind = info.driver_exit_code, info.error_type or ""
    if status is not None and status in OWN_STATUSES:
        raise _ended(f"job {job} ended with status {status}; the cause is in its last lines", status)
    why = one_line((info.message or kind).split("\n")[0])
    if status in (126, 127) or "RUNTIME_ENV" in kind:
        raise PreflightError(f"job {job} did not start ({why}); is the image the one of this version? See --python")
    if "UNSCHEDULABLE" in kind or "TIMEOUT" in kind:
        raise ResourcesError(f"job {job} did not start ({why}); the head has no room for its driver")
    raise TrainingError(f"job {job}: its driver was ended from outside ({why}); submit it again, and it goes on")


def _ended(message: str, status: int) -> EuphoniumError:
    error = EuphoniumError(message)
    error.exit_status = status
    return error

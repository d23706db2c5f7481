"""The control desk: a small named actor between a run and the command line, and the run's line to it.

The run leaves a snapshot there every second and takes what was asked for; the command line talks to the actor alone
(commands/control.py). Waits for: the desk's answer, on a task of its own. Nothing waits for it: a desk that is down
costs a warning.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from euphonium.errors import ConfigError, EuphoniumError
from euphonium.role_logs import keep_role_log
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import RunSnapshot
from euphonium.wire.roles import Desk, start_actor
from orchestrator.pools.ray_session import CONTROL, beside_the_driver

if TYPE_CHECKING:
    from ray.actor import ActorProxy

log = logging.getLogger(__name__)

POLL_EVERY_S = 1.0
ANSWER_TIMEOUT_S = 30.0


class ControlDesk:
    """Holds the latest snapshot for the command line, and its requests for the run loop."""

    def __init__(self, run_dir: Path | None = None) -> None:
        """Has no snapshot yet.

        Args:
            run_dir: folder of the run, for the log.
        """
        keep_role_log(run_dir, repr(self))
        self._snapshot: RunSnapshot | None = None
        self._taken = time.time()
        self._requests: list[dict[str, int]] = []

    def __repr__(self) -> str:
        return CONTROL

    def exchange(self, snapshot: RunSnapshot) -> list[dict[str, int]]:
        """Called by the run loop.

        Args:
            snapshot: snapshot of the run, for :meth:`status`.

        Returns:
            Requested sizes of pools since the last call, one mapping a request.
        """
        self._snapshot, self._taken = snapshot, time.time()
        requests, self._requests = self._requests, []
        return requests

    def status(self) -> tuple[RunSnapshot, float] | None:
        """The last snapshot and its age in seconds, or None before the first."""
        return None if self._snapshot is None else (self._snapshot, time.time() - self._taken)

    def scale(self, sizes: dict[str, int]) -> RunSnapshot | None:
        """Requests sizes of pools.

        Returns:
            The last snapshot, None before the first.

        Raises:
            ConfigError: the run has no such pool.
        """
        pools = {} if self._snapshot is None else self._snapshot.pools
        for role in sizes:
            if pools and role not in pools:
                raise ConfigError(f"this run has no {role} pool; it has {', '.join(pools)}")
        self._requests.append(sizes)
        log.info("asked for: %s", ", ".join(f"{role} {size}" for role, size in sizes.items()))
        return self._snapshot


class DeskLine:
    """Exchanges snapshots for requests with the control desk."""

    def __init__(self, run_dir: Path, snapshot: Callable[[], RunSnapshot], resize: Callable[[str, int], None]) -> None:
        """Creates the connection; nothing is started.

        Args:
            run_dir: folder of the run, for the desk's log.
            snapshot: returns a snapshot of the run.
            resize: changes the size of a role's pool.
        """
        self._run_dir = run_dir
        self._snapshot = snapshot
        self._resize = resize
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Starts the desk's actor."""
        options = {"name": CONTROL, **beside_the_driver()}
        self._desk: ActorProxy[Desk] = start_actor(Desk, ControlDesk, options, self._run_dir)

    def poll(self) -> None:
        """Starts to exchange snapshots for requests, once a second."""
        self._task = asyncio.ensure_future(self._poll())

    def close(self) -> None:
        """Stops what :meth:`poll` started."""
        if self._task is not None:
            self._task.cancel()

    async def _poll(self) -> None:
        while True:
            try:
                requests = await awaited(
                    self._desk.exchange.remote(self._snapshot()), ANSWER_TIMEOUT_S, "the control desk"
                )
            except EuphoniumError as error:
                log.warning("the control desk does not answer: %s", error)
                requests = []
            for sizes in requests:
                for role, size in sizes.items():
                    self._resize(role, size)
            await asyncio.sleep(POLL_EVERY_S)

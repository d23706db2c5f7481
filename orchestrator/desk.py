"""The run's side of the control desk: leaves snapshots there, and carries out requests of the command line.

Waits for: the desk's answer, once a second, in an asyncio task of its own. Nothing waits for this task: if the desk is
down, there is only a warning.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from euphonium.errors import EuphoniumError
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import RunSnapshot
from euphonium.wire.roles import Desk, start_actor
from orchestrator.commands.control import CONTROL, ControlDesk
from orchestrator.pools.ray_session import beside_the_driver

if TYPE_CHECKING:
    from ray.actor import ActorProxy

log = logging.getLogger(__name__)

POLL_EVERY_S = 1.0
ANSWER_TIMEOUT_S = 30.0


class DeskLine:
    """Exchanges snapshots for requests with the control desk."""

    def __init__(self, snapshot: Callable[[], RunSnapshot], resize: Callable[[str, int], None]) -> None:
        """Creates the connection; nothing is started.

        Args:
            snapshot: returns a snapshot of the run.
            resize: changes the size of a role's pool.
        """
        self._snapshot = snapshot
        self._resize = resize
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Starts the desk's actor."""
        self._desk: ActorProxy[Desk] = start_actor(Desk, ControlDesk, {"name": CONTROL, **beside_the_driver()})

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

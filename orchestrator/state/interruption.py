"""Giving up a wait: because a stop was requested, or because the learner group is lost.

Owns the signal handlers. Whatever may be given up is awaited through :meth:`Interruption.interruptible`; what must not
be cut in two (an update and the note that it was made) is awaited directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

from euphonium.errors import EuphoniumError

_T = TypeVar("_T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
CHECK_EVERY_S = 2.0


class StopRequestedError(Exception):
    """SIGTERM or SIGINT: leave at the next point from which the run can go on."""


class Interruption:
    """Whether a run is to stop."""

    def __init__(self, check: Callable[[], None]) -> None:
        """Nothing is installed yet.

        Args:
            check: raises if the learner group has ended; called every few seconds of a wait.
        """
        self._check = check
        self._stop = asyncio.Event()

    def install(self) -> None:
        """Has signals request a stop, within the running event loop."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.request)

    def uninstall(self) -> None:
        """Gives the signals back."""
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def request(self) -> None:
        """Requests a stop."""
        self._stop.set()

    def raise_if_requested(self) -> None:
        """Ends the loop here if a stop was requested.

        Raises:
            StopRequestedError: it was.
        """
        if self._stop.is_set():
            raise StopRequestedError

    async def interruptible(self, work: Awaitable[_T]) -> _T:
        """Awaits work that may be given up.

        Raises:
            StopRequestedError: a stop was requested meanwhile; the work has been cancelled.
            TrainingError: the learner group has ended.
        """
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            while True:
                done, _ = await asyncio.wait({task, stop}, timeout=CHECK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                if task in done:
                    return task.result()
                if stop in done:
                    raise StopRequestedError
                self._check()
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, EuphoniumError):
                    await task

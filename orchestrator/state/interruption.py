"""Interrupting a wait, because a stop was requested or the learner group has ended.

Owns the signal handlers. Work that may be given up is awaited through :meth:`Interruption.interruptible`; work that
must not be cut in two (an update and its commit) is awaited directly.
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
    """A stop was requested by SIGTERM or SIGINT; raised only where the run can be resumed."""


class Interruption:
    """Tells whether a run shall stop, and interrupts waits for that.

    Example:
        >>> async def main():
        ...     interruption = Interruption(check=lambda: None)
        ...     print(await interruption.interruptible(asyncio.sleep(0, "done")))
        ...     waiting = asyncio.ensure_future(interruption.interruptible(asyncio.sleep(3600)))
        ...     await asyncio.sleep(0)
        ...     interruption.request()  # what SIGTERM does
        ...     try:
        ...         await waiting
        ...     except StopRequestedError:
        ...         print("stopped")
        >>> asyncio.run(main())
        done
        stopped
    """

    def __init__(self, check: Callable[[], None]) -> None:
        """Starts without a request; no signal handler is installed.

        Args:
            check: raises if the learner group has ended; called every few seconds of a wait.
        """
        self._check = check
        self._stop = asyncio.Event()

    def install(self) -> None:
        """Makes SIGTERM and SIGINT request a stop; needs a running event loop."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.request)

    def uninstall(self) -> None:
        """Removes the signal handlers."""
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def request(self) -> None:
        """Requests a stop."""
        self._stop.set()

    def raise_if_requested(self) -> None:
        """Raises StopRequestedError if a stop was requested.

        Raises:
            StopRequestedError: a stop was requested.
        """
        if self._stop.is_set():
            raise StopRequestedError

    async def interruptible(self, work: Awaitable[_T]) -> _T:
        """Awaits work that may be cancelled.

        Raises:
            StopRequestedError: a stop was requested meanwhile; the work has been cancelled.
            TrainingError: the learner group has ended; the work has been cancelled.
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

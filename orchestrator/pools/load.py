"""How busy a pool is: its members' seconds of work, as a share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Load:
    """Adds up the work of a pool's members, window by window.

    Work is measured in one of two ways: by callers that reserve a member (:meth:`begin`, :meth:`end`), or by members
    that measure it themselves and report a total (:meth:`read`).

    Attributes:
        last: busy fraction of the last window.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.last = 0.0
        self._clock = clock
        self._window = clock()
        self._worked = 0.0
        self._under_way: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def begin(self, member: str) -> None:
        """Records that a member starts to work for a caller."""
        self._under_way[member] = self._clock()

    def end(self, member: str) -> None:
        """Records that it has finished; only the part in the present window counts."""
        began = self._under_way.pop(member)
        self._worked += self._clock() - max(began, self._window)

    def read(self, member: str, total_s: float) -> None:
        """Records a member's own total of seconds that it has worked since it started.

        Only differences count: a first reading, and one smaller than the last because the member was restarted, add
        nothing.
        """
        last = self._totals.get(member)
        if last is not None and total_s >= last:
            self._worked += total_s - last
        self._totals[member] = total_s

    def forget(self, member: str) -> None:
        """Forgets a lost member's reading: its next one counts as a first."""
        self._totals.pop(member, None)

    def close(self, members: int) -> float:
        """Ends the window and starts the next.

        Args:
            members: number of members of the pool.

        Returns:
            Share of the members' time that they worked in the window, at most 1.
        """
        now = self._clock()
        span = max(now - self._window, 1e-6) * max(members, 1)
        worked = self._worked + sum(now - max(began, self._window) for began in self._under_way.values())
        self._worked, self._window = 0.0, now
        self.last = min(1.0, worked / span)
        return self.last

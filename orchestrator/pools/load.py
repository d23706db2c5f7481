"""How busy a pool is: seconds of work of its members, as a share of the time that they were there."""

from __future__ import annotations

import time
from collections.abc import Callable


class Load:
    """Adds up the work of a pool's members, window by window.

    Work is counted in one of two ways: by those who have a member for themselves (:meth:`begin`, :meth:`end`), or by
    members that count for themselves and report a total (:meth:`read`).

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
        """A member begins to work for one caller."""
        self._under_way[member] = self._clock()

    def end(self, member: str) -> None:
        """It ends; only what falls into the present window counts."""
        began = self._under_way.pop(member)
        self._worked += self._clock() - max(began, self._window)

    def read(self, member: str, total_s: float) -> None:
        """Takes a member's own reading of the seconds that it has worked since it started.

        The first reading, and one that is smaller than the last because the member started anew, count as a beginning.
        """
        last = self._totals.get(member)
        if last is not None and total_s >= last:
            self._worked += total_s - last
        self._totals[member] = total_s

    def forget(self, member: str) -> None:
        """The member is lost: its next reading is a beginning."""
        self._totals.pop(member, None)

    def close(self, members: int) -> float:
        """Ends the window and begins the next.

        Args:
            members: that the pool has.

        Returns:
            Share of the members' time that they worked in the window, at most 1.
        """
        now = self._clock()
        span = max(now - self._window, 1e-6) * max(members, 1)
        worked = self._worked + sum(now - max(began, self._window) for began in self._under_way.values())
        self._worked, self._window = 0.0, now
        self.last = min(1.0, worked / span)
        return self.last

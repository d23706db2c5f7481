"""An answer under way: asked for now, awaited when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Later(Generic[T]):
    """A value that may still be under way; for one thread.

    Example:
        >>> answer = Later(lambda: 20).map(lambda value: value + 1)
        >>> answer.result()
        21
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        """Waits for nothing yet.

        Args:
            wait: gives the value or raises; called once, when the value is first needed.
        """
        self._wait = wait
        self._outcome: Future[T] = Future()

    def result(self) -> T:
        """The value; waits if it must, and raises what waiting raises, every time."""
        if not self._outcome.done():
            try:
                self._outcome.set_result(self._wait())
            except Exception as error:
                self._outcome.set_exception(error)
        return self._outcome.result()

    def map(self, function: Callable[[T], U]) -> Later[U]:
        """What a function makes of the value, once that is needed."""
        return Later(lambda: function(self.result()))

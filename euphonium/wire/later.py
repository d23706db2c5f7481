"""An answer under way: requested now, waited for when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Later(Generic[T]):
    """A value that may still be under way; to be used from one thread.

    Example:
        >>> answer = Later(lambda: print("waiting") or 20).map(lambda value: value + 1)
        >>> answer.result()  # waits once, when the value is first needed
        waiting
        21
        >>> answer.result()
        21
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        """Does not wait.

        Args:
            wait: returns the value or raises; called once, when the value is first needed.
        """
        self._wait = wait
        self._outcome: Future[T] = Future()

    def result(self) -> T:
        """The value. The first call waits; an error is raised again by every call."""
        if not self._outcome.done():
            try:
                self._outcome.set_result(self._wait())
            except Exception as error:
                self._outcome.set_exception(error)
        return self._outcome.result()

    def map(self, function: Callable[[T], U]) -> Later[U]:
        """The function's value of this one; the function is called when the result is first needed."""
        return Later(lambda: function(self.result()))

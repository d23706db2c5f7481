"""An answer under way: asked for now, awaited when it is needed."""

from __future__ import annotations

from collections.abc import Callable
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
            wait: gives the value; called when it is first needed, and never again once it has given it.
        """
        self._wait = wait
        self._value: list[T] = []

    def result(self) -> T:
        """The value; waits if it must, and raises what waiting raises."""
        if not self._value:
            self._value.append(self._wait())
        return self._value[0]

    def map(self, function: Callable[[T], U]) -> Later[U]:
        """What a function makes of the value, once that is needed."""
        return Later(lambda: function(self.result()))

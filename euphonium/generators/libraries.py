"""The libraries that networks are made of, imported with the garbage collector held off.

Their imports make hundreds of thousands of objects that stay, and the collector looks at all of them again and again: a
fifth of the seconds that an import takes, in each of a run's processes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Holds the collector off; what only cycles hold is freed afterwards."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_networks() -> None:
    """Imports the networks of diffusers, which come all at once; roles do so before they load weights."""
    with uncollected():
        import diffusers.models.autoencoders
        import diffusers.models.transformers  # noqa: F401

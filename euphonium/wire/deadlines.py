"""Waiting for answers of Ray actors, with a deadline, and with errors that say what was waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, overload

from euphonium.errors import EuphoniumError, LateError, LostActorError, TrainingError

if TYPE_CHECKING:
    from ray import ObjectRef

_T = TypeVar("_T")


def node_id() -> str:
    """Id of the Ray node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


@overload
def get(ref: Sequence[ObjectRef[_T]], timeout_s: float | None, what: str) -> list[_T]: ...
@overload
def get(ref: ObjectRef[_T], timeout_s: float | None, what: str) -> _T: ...
def get(ref: ObjectRef[_T] | Sequence[ObjectRef[_T]], timeout_s: float | None, what: str) -> _T | list[_T]:
    """Value of an object reference; blocks the thread.

    Args:
        ref: reference, or a list of them.
        timeout_s: seconds to wait; None where something else ends the wait.
        what: what is awaited, for errors: "the weights of version 3".

    Raises:
        TrainingError: it did not come in time.
        LostActorError: the actor or the object is gone.
        EuphoniumError: the error that the actor raised.
    """
    import ray

    with _typed(what):
        try:
            return ray.get(ref, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise TrainingError(f"{what} did not come within {timeout_s:.0f} s") from error


async def awaited(ref: Awaitable[_T], timeout_s: float | None, what: str) -> _T:
    """Value of one object reference, without blocking the event loop.

    Args:
        ref: reference.
        timeout_s: seconds to wait; None where something else ends the wait.
        what: what is awaited, for errors.

    Raises:
        LateError: it did not come in time.
        LostActorError: the actor or the object is gone.
        EuphoniumError: the error that the actor raised.
    """
    import ray

    with _typed(what):
        try:
            return await asyncio.wait_for(ref, timeout_s)
        except ray.exceptions.RayError:
            # It is also an instance of whatever the remote side raised, which may be a timeout of its own.
            raise
        except TimeoutError as error:
            raise LateError(f"{what} did not come within {timeout_s:.0f} s") from error


@contextmanager
def _typed(what: str) -> Iterator[None]:
    """Turns Ray's errors into the application's."""
    import ray

    began = time.monotonic()
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise remote_error(error, what) from error
    except ray.exceptions.RayError as error:
        waited = time.monotonic() - began
        raise LostActorError(f"{what} will not come, after {waited:.0f} s: {describe(error)}") from error


def remote_error(error: BaseException, what: str) -> EuphoniumError:
    """The application's error inside Ray's, or a TrainingError that quotes the cause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EuphoniumError):
        return cause
    return TrainingError(f"{what} failed: {type(cause).__name__}: {cause}")


def describe(error: BaseException) -> str:
    """Why a Ray call failed, in one line, with the reason that Ray gives for an actor's death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "cause" in line.lower() or "reason" in line.lower()), "")
    head = lines[0] if lines else type(error).__name__
    return f"{type(error).__name__}: {head}" + (f" ({reason})" if reason and reason != head else "")

"""Errors of awaited calls, without Ray: whatever can be awaited stands in for a reference."""

import asyncio
import functools

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from euphonium.errors import LateError, LostActorError, RewardError, TrainingError
from euphonium.wire.deadlines import awaited


async def fails(error: Exception) -> None:
    raise error


def remote(cause: Exception) -> Exception:
    """What Ray raises here for an error of the remote side."""
    error: Exception = RayTaskError("call", "traceback", cause).as_instanceof_cause()
    return error


def test_an_answer_that_comes_too_late_is_no_answer() -> None:
    assert asyncio.run(awaited(asyncio.sleep(0, "answer"), 1.0, "it")) == "answer"
    assert asyncio.run(awaited(asyncio.sleep(0, "answer"), None, "it")) == "answer"
    with pytest.raises(LateError, match="the group did not come within 0 s"):
        asyncio.run(awaited(asyncio.sleep(5), 0.01, "the group"))


def test_errors_of_ours_come_back_as_they_are_and_others_are_quoted() -> None:
    ask = functools.partial(awaited, timeout_s=1.0, what="the group")
    with pytest.raises(RewardError, match="judge down") as raised:
        asyncio.run(ask(fails(remote(RewardError("judge down", ["icon"])))))
    assert raised.value.rewards == ("icon",)
    # The remote side's own timeout does not mean that this one has passed.
    with pytest.raises(TrainingError, match="the group failed: TimeoutError: socket") as other:
        asyncio.run(ask(fails(remote(TimeoutError("socket")))))
    assert not isinstance(other.value, LostActorError)
    with pytest.raises(LostActorError, match=r"the group will not come.*restarting") as lost:
        asyncio.run(ask(fails(ActorUnavailableError("restarting", b"0" * 16))))
    assert not isinstance(lost.value, LateError)

"""What may be given up, and what is said when it is."""

import asyncio
import os
import signal

import pytest

from euphonium.errors import TrainingError
from orchestrator.state import interruption as module
from orchestrator.state.interruption import Interruption, StopRequestedError


def nothing_wrong() -> None:
    pass


def test_work_that_is_not_interrupted_gives_its_result_or_its_error() -> None:
    async def scene() -> None:
        interruption = Interruption(nothing_wrong)

        async def answer() -> int:
            await asyncio.sleep(0)
            return 7

        async def fail() -> None:
            raise ValueError("its own")

        assert await interruption.interruptible(answer()) == 7
        with pytest.raises(ValueError, match="its own"):
            await interruption.interruptible(fail())
        interruption.raise_if_requested()

    asyncio.run(scene())


@pytest.mark.parametrize("number", module.SIGNALS)
def test_a_signal_cancels_what_is_awaited_and_waits_until_it_has_ended(number: signal.Signals) -> None:
    async def scene() -> None:
        interruption, ended = Interruption(nothing_wrong), []
        interruption.install()
        try:

            async def work() -> None:
                try:
                    os.kill(os.getpid(), number)
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0)
                    ended.append(True)

            with pytest.raises(StopRequestedError):
                await interruption.interruptible(work())
            assert ended == [True]
            with pytest.raises(StopRequestedError):
                interruption.raise_if_requested()
        finally:
            interruption.uninstall()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_a_learner_group_that_ended_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY_S", 0.01)

    def check() -> None:
        raise TrainingError("the learner group is gone")

    async def scene() -> None:
        work = asyncio.ensure_future(asyncio.sleep(60))
        with pytest.raises(TrainingError, match="is gone"):
            await Interruption(check).interruptible(work)
        assert work.cancelled()

    asyncio.run(asyncio.wait_for(scene(), 10))

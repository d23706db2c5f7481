"""The mailbox without Ray: orders are transactions, and nobody of an earlier learner group gets or ends one."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from euphonium.errors import LostActorError
from euphonium.wire.records import Publish, Save, UpdateReport
from orchestrator.learning.mailbox import LearnerMailbox

FIRST, SECOND = Publish(version=1, average=False), Save(version=2, folder="somewhere")


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


async def joined(mailbox: LearnerMailbox, attempt: str = "a", ranks: int = 2) -> int:
    """A group that can take orders; its generation."""
    await mailbox.set_checkpoint(None, 0)
    for _ in range(ranks):
        await mailbox.join(attempt, ranks)
    await mailbox.learner_ready(attempt)
    return (await mailbox.state(-1, 0, 0.0)).generation


def started(task: asyncio.Task[Any]) -> Coroutine[Any, Any, None]:
    """Gives a task the chance to run as far as it can."""

    async def wait() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    return wait()


def test_an_order_goes_once_to_every_rank_and_is_reported_when_the_last_has_acknowledged() -> None:
    async def scene() -> None:
        mailbox = LearnerMailbox()
        generation = await joined(mailbox)
        assert await mailbox.submit(FIRST, generation)
        assert await mailbox.lease(0, "a") is FIRST
        assert await mailbox.lease(1, "a") is FIRST
        again = asyncio.ensure_future(mailbox.lease(0, "a"))
        await started(again)
        assert not again.done()
        await mailbox.acknowledge(0, "a", UpdateReport(version=1, metrics={"of rank": 0.0}))
        assert (await mailbox.state(1, generation, 0.0)).report is None
        await mailbox.acknowledge(1, "a", UpdateReport(version=1, metrics={"of rank": 1.0}))
        report = (await mailbox.state(1, generation, 0.0)).report
        assert report is not None
        assert report.metrics == {"of rank": 0.0}
        assert not again.done(), "an order that is done is not given out again"
        assert await mailbox.submit(SECOND, generation)
        assert await again is SECOND

    play(scene())


def test_nobody_joins_before_the_checkpoint_is_known_and_all_ranks_hear_the_same_one() -> None:
    async def scene() -> None:
        mailbox = LearnerMailbox()
        waiting = asyncio.ensure_future(mailbox.join("a", 2))
        await started(waiting)
        assert not waiting.done()
        await mailbox.set_checkpoint("iteration_3", 3)
        assert await waiting == ("iteration_3", 3)
        # A checkpoint that is written between the ranks' calls is not for this start.
        await mailbox.set_checkpoint("iteration_6", 6)
        assert await mailbox.join("a", 2) == ("iteration_3", 3)
        assert await mailbox.join("b", 2) == ("iteration_6", 6)
        assert (await mailbox.state(-1, -1, 0.0)).resumed == 6

    play(scene())


def test_an_order_for_another_generation_or_a_group_that_is_not_ready_is_refused() -> None:
    async def scene() -> None:
        mailbox = LearnerMailbox()
        await mailbox.set_checkpoint(None, 0)
        await mailbox.join("a", 1)
        generation = (await mailbox.state(-1, 0, 0.0)).generation
        assert not await mailbox.submit(FIRST, generation), "not ready"
        await mailbox.learner_ready("a")
        assert not await mailbox.submit(FIRST, generation - 1), "of another group"
        assert await mailbox.submit(FIRST, generation)

    play(scene())


def test_a_new_attempt_voids_what_the_one_before_had_under_way() -> None:
    async def scene() -> None:
        mailbox = LearnerMailbox()
        generation = await joined(mailbox, "a", ranks=1)
        assert await mailbox.submit(FIRST, generation)
        await mailbox.lease(0, "a")
        stale = asyncio.ensure_future(mailbox.lease(0, "a"))
        await started(stale)
        await mailbox.join("b", 1)
        with pytest.raises(LostActorError, match="another learner group"):
            await stale
        with pytest.raises(LostActorError):
            await mailbox.acknowledge(0, "a", UpdateReport(version=1))
        with pytest.raises(LostActorError):
            await mailbox.learner_ready("a")
        await mailbox.learner_ready("b")
        state = await mailbox.state(1, generation, 5.0)
        assert state.report is None
        assert state.generation not in (0, generation), "the run loop hears of the restart at once"
        fresh = asyncio.ensure_future(mailbox.lease(0, "b"))
        await started(fresh)
        assert not fresh.done(), "the order of the attempt before is gone"
        fresh.cancel()

    play(scene())


def test_the_first_reason_of_the_present_attempt_is_the_failure() -> None:
    async def scene() -> None:
        mailbox = LearnerMailbox()
        generation = await joined(mailbox, "a", ranks=2)
        await mailbox.fail("earlier", "not of this group")
        assert (await mailbox.state(-1, generation, 0.0)).failure is None
        waiting = asyncio.ensure_future(mailbox.state(1, generation, 60.0))
        await started(waiting)
        await mailbox.fail("a", "rank 0 of 2: out of memory")
        await mailbox.fail("a", "rank 1 of 2: lost rank 0")
        assert (await waiting).failure == "rank 0 of 2: out of memory"

    play(scene())


def test_a_group_of_which_a_part_joined_the_mailbox_before_cannot_take_orders() -> None:
    async def scene() -> None:
        await joined(LearnerMailbox(), "a", ranks=2)
        restarted = LearnerMailbox()
        await restarted.set_checkpoint("iteration_6", 6)
        await restarted.join("a", 2)
        with pytest.raises(LostActorError, match="was restarted while this learner group joined it"):
            await restarted.learner_ready("a")
        assert not (await restarted.state(-1, 0, 0.0)).ready
        assert await joined(restarted, "b", ranks=2)

    play(scene())

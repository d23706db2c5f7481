"""Who is in a pool and who gets whom, without Ray."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from euphonium.errors import TrainingError
from orchestrator.pools.roster import Member, Roster

EMPTY = "the test pool has no actor left"


async def roster_of(*states: str) -> Roster[None]:
    roster: Roster[None] = Roster(EMPTY)
    for i, state in enumerate(states):
        member = Member(f"m-{i}", None)
        roster.add(member)
        if state != "starting":
            await roster.join(member)
        if state == "absent":
            roster.lose(member)
    roster.wanted = len(states)
    return roster


async def settle() -> None:
    """Lets every task go on as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Worker:
    """Asks for a member, and keeps it until it is told to stop."""

    def __init__(self, roster: Roster[None], priority: int) -> None:
        self.member: Member[None] | None = None
        self.told_to_stop = asyncio.Event()
        self.task = asyncio.ensure_future(self._work(roster, priority))

    async def _work(self, roster: Roster[None], priority: int) -> None:
        async with roster.exclusive(priority) as self.member:
            await self.told_to_stop.wait()

    async def stop(self) -> None:
        self.told_to_stop.set()
        await self.task


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


# --- states -----------------------------------------------------------------------------------------------------


def test_a_member_goes_from_starting_to_present_to_absent_and_back() -> None:
    async def work() -> None:
        roster = await roster_of("starting")
        (member,) = roster.members
        assert (roster.starting, roster.present, roster.reachable) == ([member], [], [])
        assert not roster.lose(member), "only who is present is lost"
        assert await roster.join(member)
        assert (roster.starting, roster.present, roster.reachable) == ([], [member], [member])
        assert not await roster.join(member)
        assert roster.lose(member)
        assert (member.state, roster.present, roster.reachable) == ("absent", [], [member])
        assert await roster.join(member)
        assert (member.state, member.joins) == ("present", 2)

    run(work())


def test_a_member_that_leaves_neither_joins_nor_is_lost() -> None:
    async def work() -> None:
        roster = await roster_of("present", "present")
        (leaving,) = roster.shrink(1)
        assert not roster.lose(leaving)
        assert not await roster.join(leaving)
        assert (leaving.state, leaving in roster.reachable, leaving in roster.staying) == ("leaving", False, False)
        assert await roster.remove(leaving)
        assert not await roster.remove(leaving)
        assert not await roster.join(leaving)
        assert roster.wanted == len(roster.members) == 1

    run(work())


def test_shrinking_takes_the_absent_first_then_the_idle_and_of_these_the_youngest() -> None:
    async def work() -> None:
        roster = await roster_of("present", "present", "present", "starting", "absent", "present")
        worker = Worker(roster, 0)
        await settle()
        assert worker.member is roster.members[0]
        orders = [[member.name for member in roster.shrink(size)] for size in (5, 4, 3, 2, 1)]
        assert orders == [["m-4"], ["m-3"], ["m-5"], ["m-2"], ["m-1"]]
        assert roster.staying == [worker.member]
        assert roster.shrink(1) == []
        with pytest.raises(ValueError, match="at least one"):
            roster.shrink(0)
        await worker.stop()

    run(work())


def test_a_pool_that_loses_a_member_for_good_wants_one_less() -> None:
    async def work() -> None:
        roster = await roster_of("present", "present", "present")
        roster.shrink(2)
        await roster.remove(roster.members[0])
        assert (roster.wanted, len(roster.staying), len(roster.members)) == (1, 1, 2)

    run(work())


# --- hand-out ---------------------------------------------------------------------------------------------------


def test_the_lowest_priority_goes_first_and_equal_ones_in_the_order_of_their_coming() -> None:
    async def work() -> None:
        roster = await roster_of("present")
        first = Worker(roster, 9)
        await settle()
        waiting = {name: Worker(roster, priority) for name, priority in [("c", 5), ("d", 5), ("a", -1), ("b", 0)]}
        await settle()
        await first.stop()
        for name in "abcd":
            await settle()
            assert [n for n, worker in waiting.items() if worker.member] == [name]
            await waiting.pop(name).stop()

    run(work())


def test_members_that_join_together_all_get_work_at_once() -> None:
    async def work() -> None:
        roster = await roster_of("starting", "starting", "starting")
        workers = [Worker(roster, priority) for priority in (3, 2, 1, 0)]
        await settle()
        assert not roster.working
        for member in roster.members:
            await roster.join(member)
        await settle()
        assert [worker.member is not None for worker in workers] == [False, True, True, True]
        assert roster.working == roster.members
        for worker in reversed(workers):
            await worker.stop()
        assert roster.working == []

    run(work())


def test_who_waits_and_is_cancelled_lets_the_next_one_go() -> None:
    async def work() -> None:
        roster = await roster_of("present")
        holder, first, second = Worker(roster, 0), Worker(roster, 1), Worker(roster, 2)
        await settle()
        first.task.cancel()
        await settle()
        await holder.stop()
        await settle()
        assert second.member is not None
        await second.stop()

    run(work())


@pytest.mark.parametrize("turns", range(8))
def test_who_is_cancelled_while_a_member_is_handed_over_loses_none(turns: int) -> None:
    async def work() -> None:
        roster = await roster_of("present")
        holder, first, second = Worker(roster, 0), Worker(roster, 1), Worker(roster, 2)
        await settle()
        holder.told_to_stop.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        first.task.cancel()
        await settle()
        assert second.member is not None
        await second.stop()
        assert roster.working == []

    run(work())


def test_a_member_that_is_lost_at_work_is_handed_out_again_only_when_it_is_back_and_free() -> None:
    async def work() -> None:
        roster = await roster_of("present")
        (member,) = roster.members
        first, second = Worker(roster, 0), Worker(roster, 1)
        await settle()
        roster.lose(member)
        await roster.join(member)
        await settle()
        assert second.member is None, "somebody still has it"
        roster.lose(member)
        await first.stop()
        await settle()
        assert second.member is None, "it is absent"
        await roster.join(member)
        await settle()
        assert second.member is member
        await second.stop()

    run(work())


def test_removing_the_last_member_wakes_everybody_with_the_error() -> None:
    async def work() -> None:
        roster = await roster_of("present", "present")
        holders = [Worker(roster, 0), Worker(roster, 0)]
        await settle()
        (leaving,) = roster.shrink(1)
        waiting = [Worker(roster, i).task for i in (1, 2)]
        last = roster.staying[0]
        roster.lose(last)
        waiting.append(asyncio.ensure_future(roster.wait_present()))
        await settle()
        assert not any(task.done() for task in waiting)
        await roster.remove(last)
        # The one that is left is leaving: nobody may hope for it.
        assert roster.members == [leaving]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [(type(error), str(error)) for error in results] == [(TrainingError, EMPTY)] * 3
        for holder in holders:
            await holder.stop()
        with pytest.raises(TrainingError, match=EMPTY):
            async with roster.exclusive(0):
                pass

    run(work())


# --- waits ------------------------------------------------------------------------------------------------------


def test_waiting_for_somebody_present_ends_when_one_joins() -> None:
    async def work() -> None:
        roster = await roster_of("starting", "absent")
        waiting = asyncio.ensure_future(roster.wait_present())
        await settle()
        assert not waiting.done()
        await roster.join(roster.members[1])
        await waiting

    run(work())


def test_the_start_is_over_when_all_have_answered_or_were_given_up_or_one_failed() -> None:
    async def work() -> None:
        roster = await roster_of("starting", "starting", "present")
        waiting = asyncio.ensure_future(roster.wait_started())
        await settle()
        await roster.join(roster.members[0])
        await settle()
        assert not waiting.done()
        await roster.remove(roster.members[1])
        await waiting
        roster.add(Member("m-3", None))
        waiting = asyncio.ensure_future(roster.wait_started())
        await settle()
        await roster.fail(TrainingError("m-3 failed to start"))
        with pytest.raises(TrainingError, match="m-3 failed to start"):
            await waiting

    run(work())


def test_waiting_until_idle_waits_for_what_is_under_way_and_for_nothing_that_comes_later() -> None:
    async def work() -> None:
        roster = await roster_of("present")
        await roster.wait_idle()
        first, second = Worker(roster, 0), Worker(roster, 1)
        await settle()
        waiting = asyncio.ensure_future(roster.wait_idle())
        await settle()
        assert not waiting.done()
        await first.stop()
        await waiting
        assert second.member is not None, "the same member is at work again without a moment between"
        await second.stop()

    run(work())


def test_work_of_a_member_that_is_removed_is_not_waited_for() -> None:
    async def work() -> None:
        roster = await roster_of("present", "present")
        worker = Worker(roster, 0)
        await settle()
        assert worker.member is not None
        waiting = asyncio.ensure_future(roster.wait_idle())
        await settle()
        await roster.remove(worker.member)
        await waiting
        await worker.stop()

    run(work())


def test_a_leaving_member_waits_for_its_own_work_and_for_shared_work_but_not_for_others() -> None:
    async def work() -> None:
        roster = await roster_of("present", "present")
        mine, other = Worker(roster, 0), Worker(roster, 1)
        await settle()
        assert mine.member is not None
        shared = roster.shared()
        await shared.__aenter__()
        waiting = asyncio.ensure_future(roster.wait_released(mine.member))
        await settle()
        await mine.stop()
        await settle()
        assert not waiting.done()
        await shared.__aexit__(None, None, None)
        await waiting
        await other.stop()

    run(work())

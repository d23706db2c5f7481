"""The line to the learner group: a group that joins, starts anew, fails, is late, and a mailbox that dies."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from euphonium.errors import TrainingError
from euphonium.wire.records import Publish, Save, UpdateReport
from orchestrator.learning import link as module
from orchestrator.learning.link import LearnerRestartedError
from tests.orchestrator.learning.in_process import Impatient, Setting, play, turn_over

ORDER = Publish(version=1, average=False)


def test_a_group_that_joins_resumes_from_the_checkpoint_that_was_named_and_takes_orders(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = setting.link
        assert setting.group.started
        assert not link.usable
        assert not link.has_joined
        told, iteration = await asyncio.gather(setting.join(), link.joined("step_3", 3))
        assert told == ("step_3", 3)
        assert iteration == 3
        assert link.has_joined
        assert link.usable
        order = Save(version=3, folder="step_4")
        taken, report = await asyncio.gather(setting.work(), link.carry_out(order))
        assert taken is order
        assert report == UpdateReport(version=3, metrics={"loss": 0.5})
        setting.group.ended = TrainingError("ended")
        assert not link.usable
        assert link.has_joined

    play(scene())


def test_an_order_is_refused_by_a_group_that_has_started_anew_and_goes_to_it_once_it_is_known(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        await link.resume_from("step_5", 5)
        assert await setting.join("b") == ("step_5", 5)
        fresh = asyncio.ensure_future(setting.work("b"))
        with pytest.raises(LearnerRestartedError):
            await link.carry_out(ORDER)
        await turn_over()
        assert not fresh.done(), "the group has got no order"
        assert await link.joined("step_5", 5) == 5
        await link.carry_out(ORDER)
        assert await fresh is ORDER

    play(scene())


def test_a_group_that_starts_anew_over_an_order_ends_the_wait_for_its_report(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        waiting = asyncio.ensure_future(link.carry_out(ORDER))
        await setting.mailbox.lease.remote(0, "a")
        await setting.join("b")
        with pytest.raises(LearnerRestartedError):
            await waiting

    play(scene())


def test_a_group_in_another_ones_place_is_awaited_until_it_can_take_orders(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting(mailbox=Impatient)
        link = await setting.up()

        async def asked_again() -> None:
            before = setting.mailbox.actor.answers
            while setting.mailbox.actor.answers < before + 2:
                await asyncio.sleep(0)

        waiting = asyncio.ensure_future(link.replaced())
        await asked_again()
        assert not waiting.done(), "the group that is there is the one to be replaced"
        await setting.mailbox.join.remote("b", 1)
        await asked_again()
        assert not waiting.done(), "it cannot take orders yet"
        await setting.mailbox.learner_ready.remote("b")
        await waiting
        assert (await asyncio.gather(setting.work("b"), link.carry_out(ORDER)))[0] is ORDER

    play(scene())


def test_why_a_rank_gave_up_is_what_the_run_ends_with(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        waiting = asyncio.ensure_future(link.carry_out(ORDER))
        await setting.mailbox.lease.remote(0, "a")
        await setting.mailbox.fail.remote("a", "learner rank 0 of 1: out of memory")
        with pytest.raises(TrainingError, match=r"^learner rank 0 of 1: out of memory$") as caught:
            await waiting
        assert not isinstance(caught.value, LearnerRestartedError)
        with pytest.raises(TrainingError, match="out of memory"):
            await link.replaced()

    play(scene())


@pytest.mark.parametrize("joins", [True, False])
def test_a_group_that_ends_ends_the_wait(make_setting: Callable[..., Setting], joins: bool) -> None:
    async def scene() -> None:
        setting = make_setting(mailbox=Impatient)
        wait: Coroutine[Any, Any, Any]
        wait = (await setting.up()).carry_out(ORDER) if joins else setting.link.joined(None, 0)
        setting.group.ended = TrainingError("the learner group failed: no room on any node")
        with pytest.raises(TrainingError, match="no room on any node"):
            await wait

    play(scene())


def test_a_group_that_does_not_start_in_time_is_an_error_that_names_the_setting(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting("pools.learner.start_timeout_s=0.05", mailbox=Impatient)
        with pytest.raises(TrainingError, match=r"did not start within 0 s.*raise pools\.learner\.start_timeout_s"):
            await setting.link.joined(None, 0)

    play(scene())


def test_an_order_that_takes_too_long_is_an_error_that_names_the_setting(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        link = await make_setting("pools.learner.update_timeout_s=0.05", mailbox=Impatient).up()
        with pytest.raises(TrainingError, match=r"iteration 1, .* for 0 s \(pools\.learner\.update_timeout_s\)"):
            await link.carry_out(ORDER)

    play(scene())


def test_an_order_may_take_any_time_while_the_group_gives_signs_of_life(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting("pools.learner.update_timeout_s=1.0", mailbox=Impatient)
        link = await setting.up()
        waiting = asyncio.ensure_future(link.carry_out(ORDER))
        for _ in range(15):
            await asyncio.sleep(0.1)
            await setting.mailbox.alive.remote("a")
        assert not waiting.done()
        for _ in range(15):
            # Those of a group that is gone do not count.
            await asyncio.sleep(0.1)
            await setting.mailbox.alive.remote("before")
        assert waiting.done()
        with pytest.raises(TrainingError, match=r"pools\.learner\.update_timeout_s"):
            await waiting

    play(scene())


def test_a_mailbox_that_dies_over_an_order_is_a_restart_of_the_group(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        waiting = asyncio.ensure_future(link.carry_out(ORDER))
        await setting.mailbox.lease.remote(0, "a")
        setting.mailbox.restart()
        with pytest.raises(LearnerRestartedError, match="the learner mailbox will not come"):
            await waiting
        # It has forgotten the group, which joins it again.
        told, iteration = await asyncio.gather(setting.join("b"), link.joined("step_6", 6))
        assert (told, iteration) == (("step_6", 6), 6)
        assert (await asyncio.gather(setting.work("b"), link.carry_out(ORDER)))[0] is ORDER

    play(scene())


def test_a_mailbox_that_dies_while_a_group_is_awaited_is_told_the_checkpoint_again(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        waiting = asyncio.ensure_future(link.joined("step_6", 6))
        await turn_over()
        setting.mailbox.die()
        # Still gone after the first pause.
        setting.pauses = [lambda: None, setting.mailbox.restart]
        await turn_over()
        assert await setting.join("b") == ("step_6", 6)
        assert await waiting == 6
        assert setting.pauses == []

    play(scene())


def test_a_group_that_joins_a_restarted_mailbox_before_it_is_awaited_has_joined(
    make_setting: Callable[..., Setting],
) -> None:
    async def scene() -> None:
        setting = make_setting("pools.learner.start_timeout_s=0.5", mailbox=Impatient)
        link = await setting.up()
        setting.mailbox.restart()
        # What the run loop does when a checkpoint is complete.
        await link.resume_from("step_6", 6)
        assert await setting.join("b") == ("step_6", 6)
        assert await link.joined("step_6", 6) == 6
        assert (await asyncio.gather(setting.work("b"), link.carry_out(ORDER)))[0] is ORDER

    play(scene())


def test_an_order_for_the_group_of_the_mailbox_before_is_refused(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        setting.mailbox.restart()
        await link.resume_from("step_4", 4)
        await setting.join("b")
        fresh = asyncio.ensure_future(setting.work("b"))
        with pytest.raises(LearnerRestartedError):
            await link.carry_out(ORDER)
        await turn_over()
        assert not fresh.done(), "the group has got no order"
        assert await link.joined("step_4", 4) == 4
        await link.carry_out(ORDER)
        assert await fresh is ORDER

    play(scene())


def test_a_mailbox_that_does_not_come_back_ends_the_run(
    make_setting: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        setting.mailbox.die()
        with pytest.raises(TrainingError, match="the learner mailbox does not come back") as caught:
            await link.joined("step_3", 3)
        assert not isinstance(caught.value, LearnerRestartedError)

    monkeypatch.setattr(module, "RECOVERY_TIMEOUT_S", 0.02)
    play(scene())

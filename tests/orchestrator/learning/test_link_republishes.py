"""The line to the learner group: weights that the store has lost are published again, once."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from euphonium.errors import LostActorError
from euphonium.wire.records import Publish, UpdateReport
from euphonium.wire.weights.manifest import WeightManifest
from orchestrator.learning import link as module
from tests.orchestrator.learning.in_process import Setting, play, turn_over


def test_weights_that_the_store_has_by_now_are_not_published_again(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        setting.store.actor.commit(WeightManifest(version=3, kind="policy", buckets=()))
        await link.republish(3)
        assert setting.said == []
        # An older version is not enough, and the average is not the policy.
        setting.store.actor.commit(WeightManifest(version=4, kind="average", buckets=()))
        order, _ = await asyncio.gather(setting.work(), link.republish(4))
        assert order == Publish(version=4, average=False)
        assert len(setting.said) == 1
        assert "publishing version 4 again" in setting.said[0]

    play(scene())


def test_the_average_is_published_again_where_there_is_one(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting("optimizer.ema_decay=0.9")
        link = await setting.up()
        order, _ = await asyncio.gather(setting.work(), link.republish(4))
        assert order == Publish(version=4, average=True)

    play(scene())


def test_weights_are_published_once_for_all_who_miss_them(make_setting: Callable[..., Setting]) -> None:
    """Those who wait for their turn find the weights there."""

    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()

        async def publish() -> list[Any]:
            order = await setting.mailbox.lease.remote(0, "a")
            setting.store.actor.commit(WeightManifest(version=order.version, kind="policy", buckets=()))
            await setting.mailbox.acknowledge.remote(0, "a", UpdateReport(version=order.version))
            return [order]

        async with link.turn:
            missing = [asyncio.ensure_future(link.republish(3)) for _ in range(3)]
            await turn_over()
            assert setting.said == [], "the group is at work on other orders"
        await asyncio.gather(publish(), *missing)
        assert len(setting.said) == 1

    play(scene())


def test_a_store_that_dies_is_awaited_and_published_to(make_setting: Callable[..., Setting]) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        setting.store.actor.commit(WeightManifest(version=3, kind="policy", buckets=()))
        setting.store.die()
        setting.pauses = [lambda: None, setting.store.restart]
        order, _ = await asyncio.gather(setting.work(), link.republish(3))
        assert order == Publish(version=3, average=False), "what it had is forgotten"
        assert setting.pauses == []

    play(scene())


def test_a_store_that_does_not_come_back_is_lost(
    make_setting: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        setting = make_setting()
        link = await setting.up()
        setting.store.die()
        with pytest.raises(LostActorError, match="the weight store will not come"):
            await link.republish(3)
        assert not link.turn.locked()

    monkeypatch.setattr(module, "RECOVERY_TIMEOUT_S", 0.02)
    play(scene())

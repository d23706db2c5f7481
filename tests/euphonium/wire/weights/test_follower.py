"""Which weights an actor holds, with the real store behind references that are there already."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, ObjectLostError

from euphonium.config import PoolsConfig
from euphonium.errors import LostActorError, TrainingError, WeightsMissingError
from euphonium.wire.records import WeightOrder
from euphonium.wire.roles import RolloutContext
from euphonium.wire.weights.channel import Channel, listen
from euphonium.wire.weights.follower import Held, WeightFollower
from euphonium.wire.weights.manifest import WeightManifest, load_tensors, pack
from euphonium.wire.weights.store import WeightStore

CPU = torch.device("cpu")


class Policy:
    """Where the tensors go."""

    def __init__(self) -> None:
        self.tensors = {"w": torch.zeros(3)}
        self.loads: list[int] = []

    def load(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loads.append(version)
        load_tensors(tensors, self.tensors)


class Handle:
    """The store's handle: calls are made at once, and a reference is the value itself or the error of getting it."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.store, name))


def value_of(ref: Any, timeout: float | None = None) -> Any:
    for one in ref if isinstance(ref, list) else [ref]:
        if isinstance(one, Exception):
            raise one
    return ref


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    monkeypatch.setattr(ray, "get", value_of)
    return WeightStore()


def publish(store: WeightStore, version: int, value: float, kind: Any = "policy", *, lost: bool = False) -> None:
    bucket, description = pack({"w": torch.full((3,), value)})
    reference: Any = ObjectLostError("0" * 56, None, "") if lost else bucket
    store.put_bucket(version, kind, 0, [reference], keep=False)
    store.commit(WeightManifest(version=version, kind=kind, buckets=(description,)))


def follower_of(store: WeightStore) -> tuple[WeightFollower, Policy]:
    policy = Policy()
    handle: Any = Handle(store)
    pools = PoolsConfig.model_validate({"learner": {"weight_broadcast_timeout_s": 20.0}})
    return WeightFollower(handle, policy.load, CPU, pools), policy


def test_weights_are_fetched_when_an_order_asks_for_others_than_are_held(store: WeightStore) -> None:
    follower, policy = follower_of(store)
    publish(store, 4, 4.0)
    publish(store, 4, 0.5, "average")
    assert follower.follow(RolloutContext(version=3, history=0)) > 0
    assert (follower.holds, policy.tensors["w"].tolist()) == (Held(0, 4, "policy"), [4.0] * 3)
    # Newer than was asked for is good enough; the store is not asked again.
    publish(store, 5, 5.0)
    assert follower.follow(RolloutContext(version=4, history=0)) == 0.0
    assert policy.loads == [4]
    # Weights of another history, kind or version are not.
    follower.follow(RolloutContext(version=4, history=1))
    assert (follower.holds, policy.tensors["w"].tolist()) == (Held(1, 5, "policy"), [5.0] * 3)
    follower.follow(RolloutContext(version=4, history=1, kind="average"))
    assert (follower.holds, policy.tensors["w"].tolist()) == (Held(1, 4, "average"), [0.5] * 3)
    with pytest.raises(WeightsMissingError, match="no version 6"):
        follower.follow(RolloutContext(version=6, history=1))


def test_what_the_store_has_lost_is_missing_and_the_store_is_told(store: WeightStore) -> None:
    follower, policy = follower_of(store)
    publish(store, 2, 2.0, lost=True)
    with pytest.raises(WeightsMissingError, match="learner that published the weights is gone"):
        follower.follow(RolloutContext(version=2, history=0))
    assert store.newest("policy") == -1
    assert (follower.holds, policy.loads) == (None, [])


def test_a_store_that_is_gone_is_weights_that_are_missing(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    follower, _ = follower_of(store)
    monkeypatch.setattr(store, "fetch", lambda version, kind: ActorDiedError())
    with pytest.raises(WeightsMissingError, match="weight store is gone"):
        follower.follow(RolloutContext(version=0, history=0))


def test_damaged_weights_are_not_held(store: WeightStore) -> None:
    follower, _ = follower_of(store)
    publish(store, 1, 1.0)
    follower.follow(RolloutContext(version=1, history=0))
    publish(store, 2, 2.0)
    _, (bucket,) = store.fetch(2, "policy")
    bucket[0][5] ^= 1  # type: ignore[index]
    with pytest.raises(TrainingError, match="damaged"):
        follower.follow(RolloutContext(version=2, history=0))
    assert follower.holds is None


def test_weights_that_come_by_broadcast_are_held_and_a_lost_sender_leaves_none(store: WeightStore) -> None:
    follower, policy = follower_of(store)
    tcp = listen(20.0)
    order = WeightOrder(version=7, kind="policy", history=2, address=f"127.0.0.1:{tcp.port}", rank=1, size=2)
    with ThreadPoolExecutor(1) as thread:
        received = thread.submit(follower.receive, order)
        sender = Channel(tcp, 0, 2, 20.0, CPU)
        sender.send(0, [{"w": torch.full((3,), 7.0)}])
        received.result(20)
    assert (follower.holds, policy.tensors["w"].tolist()) == (Held(2, 7, "policy"), [7.0] * 3)
    assert follower.follow(RolloutContext(version=6, history=2)) == 0.0
    del sender, tcp
    with pytest.raises(LostActorError):
        follower.receive(order)
    assert follower.holds is None

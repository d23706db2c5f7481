"""Publication by groups of one rank and of two, whose senders fail in turn."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, WeightsMissingError
from euphonium.wire.weights import sender as sending
from euphonium.wire.weights.sender import BroadcastSender, Buckets, ObjectStoreSender, Publication, Sent
from learners.policy.publication import Publisher
from tests.ranks import run_ranks

PUBLICATION = Publication(version=3, kind="average")


class Policy:
    """Collects two buckets, and notes how far."""

    def __init__(self) -> None:
        self.collected: list[str] = []

    def gathered(self, bucket_bytes: int, *, average: bool) -> Iterator[dict[str, torch.Tensor]]:
        assert average
        for name in ("a", "b"):
            self.collected.append(name)
            yield {name: torch.zeros(1)}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def store_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the object store fail so many times, after the first bucket."""

    def fail(count: int) -> None:
        left = iter(range(count))

        def put(self: ObjectStoreSender, publication: Publication, buckets: Buckets) -> Sent:
            if next(left, None) is not None:
                next(iter(buckets))
                raise WeightsMissingError("restarted")
            return Sent(nbytes=sum(tensor.nbytes for bucket in buckets for tensor in bucket.values()))

        monkeypatch.setattr(ObjectStoreSender, "_put", put)
        monkeypatch.setattr(sending, "STORE_PAUSE_S", 0.0)

    return fail


def publisher_of(make_config: Callable[..., RunConfig]) -> tuple[Publisher, Policy]:
    policy: Any = Policy()
    return Publisher(make_config(), 0, torch.device("cpu"), policy), policy


def test_a_failure_is_repeated_once_everything_has_been_collected(
    group: None, make_config: Callable[..., RunConfig], store_fails: Callable[[int], None]
) -> None:
    publisher, policy = publisher_of(make_config)
    store_fails(2)
    store: Any = None
    assert publisher.publish(store, PUBLICATION) == {"weights/bytes": 8.0, "weights/receivers": 0.0}
    assert policy.collected == ["a", "b"] * 3


def test_attempts_are_bounded(
    group: None, make_config: Callable[..., RunConfig], store_fails: Callable[[int], None]
) -> None:
    publisher, policy = publisher_of(make_config)
    store_fails(100)
    store: Any = None
    with pytest.raises(LostActorError, match="did not take version 3 in 5 attempts"):
        publisher.publish(store, PUBLICATION)
    assert policy.collected == ["a", "b"] * 5


def test_an_error_that_no_repetition_mends_is_raised_at_once(
    group: None, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, _ = publisher_of(make_config)
    monkeypatch.setattr(ObjectStoreSender, "_put", lambda *_: 1 / 0)
    store: Any = None
    with pytest.raises(ZeroDivisionError):
        publisher.publish(store, PUBLICATION)


def test_a_broadcast_that_fails_is_repeated_through_the_store_and_the_next_one_is_tried_again(
    group: None,
    make_config: Callable[..., RunConfig],
    store_fails: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publisher, policy = publisher_of(make_config)
    store_fails(0)
    announced: list[tuple[str, ...]] = []

    def announce(self: BroadcastSender, publication: Publication) -> None:
        announced.append(publication.receivers)
        if len(announced) == 1:
            raise LostActorError("rollout-0 does not come")

    def send(self: BroadcastSender, publication: Publication, buckets: Buckets) -> Sent:
        return Sent(nbytes=sum(tensor.nbytes for bucket in buckets for tensor in bucket.values()), receivers=1)

    monkeypatch.setattr(BroadcastSender, "announce", announce)
    monkeypatch.setattr(BroadcastSender, "send", send)
    store: Any = None
    publication = Publication(version=3, kind="average", receivers=("rollout-0",))
    assert publisher.publish(store, publication) == {"weights/bytes": 8.0, "weights/receivers": 0.0}
    # Nothing is collected for receivers that do not come.
    assert policy.collected == ["a", "b"]
    assert publisher.publish(store, publication) == {"weights/bytes": 8.0, "weights/receivers": 1.0}
    assert announced == [("rollout-0",)] * 2


@pytest.fixture
def publish_on_two_ranks(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> Callable[[int], list[dict[str, Any]]]:
    """What happens on two ranks whose broadcast fails, and whose object store fails so many times after that."""

    def go(failures: int) -> list[dict[str, Any]]:
        make_config()
        run_ranks(2, Path(__file__).with_name("publication_worker.py"), tmp_path, failures, timeout_s=300)
        return [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]

    return go


def test_what_fails_on_rank_0_is_repeated_by_all_ranks(
    publish_on_two_ranks: Callable[[int], list[dict[str, Any]]],
) -> None:
    first, second = publish_on_two_ranks(2)
    whole = [3.0, 30.0]
    assert first["sent"] == ["broadcast", *["object store"] * 3, whole]
    assert first["collected"] == second["collected"] == whole * 3
    assert first["outcome"] == {"weights/bytes": 8.0, "weights/receivers": 0.0}
    assert second["sent"] == []


def test_all_ranks_give_up_together(publish_on_two_ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    first, second = publish_on_two_ranks(100)
    assert first["outcome"] == second["outcome"]
    assert "did not take version 3 in 6 attempts" in first["outcome"]
    assert first["collected"] == second["collected"] == [3.0, 30.0] * 5

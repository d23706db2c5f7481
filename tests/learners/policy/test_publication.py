"""Publication by a group of one rank, whose senders fail in turn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from euphonium.config import RunConfig
from euphonium.errors import LostActorError, WeightsMissingError
from euphonium.wire.weights import sender as sending
from euphonium.wire.weights.sender import Buckets, ObjectStoreSender, Publication, Sent
from learners.policy.publication import Publisher

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

"""The fallback from broadcast to object store; both ways of sending run against real actors in tests/test_end_to_end.py
and, through the publisher, in tests/learners/policy/test_publication.py."""

from collections.abc import Iterator

import pytest
import torch

from euphonium.errors import LostActorError, TrainingError, WeightsMissingError
from euphonium.wire.weights.sender import BroadcastSender, Buckets, FallbackSender, Publication, Sent

PUBLICATION = Publication(version=3, kind="policy", receivers=("rollout-0", "rollout-1"))


class Broadcast(BroadcastSender):
    """Reaches two receivers, or nobody."""

    def __init__(self, fails: Exception | None = None, in_announcement: bool = False) -> None:
        super().__init__(1.0, torch.device("cpu"))
        self.fails, self.in_announcement, self.calls = fails, in_announcement, []

    def announce(self, publication: Publication) -> None:
        self.calls.append("announce")
        if self.fails and self.in_announcement:
            raise self.fails

    def send(self, publication: Publication, buckets: Buckets) -> Sent:
        self.calls.append("send")
        next(iter(buckets))
        if self.fails:
            raise self.fails
        return Sent(nbytes=8, receivers=2)

    def close(self) -> None:
        self.calls.append("close")


class Store:
    """An object store's sender that fails for a while."""

    attempts = 2

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.sent: list[list[str]] = []

    def announce(self, publication: Publication) -> None:
        pass

    def send(self, publication: Publication, buckets: Buckets) -> Sent:
        self.sent.append([name for bucket in buckets for name in bucket])
        if len(self.sent) <= self.failures:
            raise WeightsMissingError("restarted")
        return Sent(nbytes=8)


def buckets() -> Iterator[dict[str, torch.Tensor]]:
    yield {"a": torch.zeros(1)}
    yield {"b": torch.zeros(1)}


def test_a_broadcast_that_works_needs_no_store() -> None:
    broadcast, store = Broadcast(), Store()
    sender = FallbackSender(broadcast, store)
    sender.announce(PUBLICATION)
    assert sender.send(PUBLICATION, buckets()) == Sent(nbytes=8, receivers=2)
    assert broadcast.calls == ["announce", "send"]
    assert store.sent == []


@pytest.mark.parametrize("error", [LostActorError("gone"), TrainingError("refused"), TrainingError("late")])
@pytest.mark.parametrize("in_announcement", [True, False])
def test_whatever_fails_in_a_broadcast_may_be_repeated_and_goes_through_the_store(
    error: Exception, in_announcement: bool
) -> None:
    broadcast, store = Broadcast(error, in_announcement), Store(failures=1)
    sender = FallbackSender(broadcast, store)
    outcomes: list[object] = []
    for _ in range(sender.attempts):
        try:
            sender.announce(PUBLICATION)
            outcomes.append(sender.send(PUBLICATION, buckets()))
        except (LostActorError, WeightsMissingError) as failure:
            outcomes.append(type(failure))
    assert outcomes == [LostActorError, WeightsMissingError, Sent(nbytes=8)]
    # The channel is given up, and the store gets every bucket from the first on.
    assert broadcast.calls == ["announce", *(["send"] if not in_announcement else []), "close"]
    assert store.sent == [["a", "b"]] * 2

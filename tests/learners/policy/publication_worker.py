"""One of two ranks that publish together; the senders of rank 0 fail as often as it is told.

Arguments: folder with a recipe, failures of the object store. Writes what happened as ``rank_N.json``.
"""

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from euphonium.config import load_config
from euphonium.errors import LostActorError, WeightsMissingError
from euphonium.wire.weights import sender as sending
from euphonium.wire.weights.sender import BroadcastSender, Buckets, ObjectStoreSender, Publication, Sent
from learners.policy.publication import Publisher


class Policy:
    """Collects buckets from both ranks, as the parts of a partitioned policy are: nobody can do so alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.collected: list[float] = []

    def gathered(self, bucket_bytes: int, *, average: bool) -> Iterator[dict[str, torch.Tensor]]:
        for number in (1.0, 10.0):
            whole = torch.tensor([number * (self.rank + 1)])
            dist.all_reduce(whole)
            self.collected.append(whole.item())
            yield {str(number): whole}


def main() -> None:
    folder, failures = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    rank = dist.get_rank()
    sent: list[Any] = []

    def announce(self: BroadcastSender, publication: Publication) -> None:
        sent.append("broadcast")
        raise LostActorError("rollout-1 does not come")

    def put(self: ObjectStoreSender, publication: Publication, buckets: Buckets) -> Sent:
        sent.append("object store")
        if len(sent) - 1 <= failures:
            next(iter(buckets))
            raise WeightsMissingError("restarted")
        values = [tensor.item() for bucket in buckets for tensor in bucket.values()]
        sent.append(values)
        return Sent(nbytes=4 * len(values))

    BroadcastSender.announce = announce  # type: ignore[method-assign]
    ObjectStoreSender._put = put  # type: ignore[method-assign]
    sending.STORE_PAUSE_S = 0.0
    policy, store = Policy(rank), object()
    publisher = Publisher(load_config(folder / "recipe.yaml"), rank, torch.device("cpu"), policy)  # type: ignore[arg-type]
    try:
        publication = Publication(version=3, kind="policy", receivers=("rollout-0", "rollout-1"))
        outcome: Any = publisher.publish(store, publication)  # type: ignore[arg-type]
    except LostActorError as error:
        outcome = str(error)
    record = {"collected": policy.collected, "sent": sent, "outcome": outcome}
    (folder / f"rank_{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


main()

"""The first update of an iteration, as far as it has been computed while other groups were still being drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from euphonium.wire.records import TrainingGroup
from learners.policy.batching import Shares
from learners.policy.statistics import UpdateStatistics


@dataclass
class Begun:
    """What has been added up so far.

    Attributes:
        statistics: of what has been computed.
        groups: ordinals of the groups that were there.
        shares: micro-batches of every rank that have been computed.
    """

    statistics: UpdateStatistics
    groups: tuple[int, ...]
    shares: Shares

    @property
    def done(self) -> int:
        """Number of micro-batches that each rank has computed."""
        return len(self.shares[0])

    def begins(self, groups: Sequence[TrainingGroup], shares: Shares) -> bool:
        """Whether these groups and micro-batches begin with those that have been computed.

        All ranks answer alike, because the micro-batches of all ranks are compared.
        """
        same_groups = ordinals(groups)[: len(self.groups)] == self.groups
        return same_groups and [share[: self.done] for share in shares] == self.shares


def ordinals(groups: Sequence[TrainingGroup]) -> tuple[int, ...]:
    """Ordinals of groups in the run."""
    return tuple(group.info.task.group_id for group in groups)

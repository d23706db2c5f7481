"""Which samples of a group are drawn: all of them, or a part while other actors draw the others.

Whatever is random is drawn for the whole group, and the part takes its share: so a sample does not depend on who draws
it, or with which others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from euphonium.wire.records import GroupTask


@dataclass(frozen=True)
class Members:
    """Consecutive samples of a group.

    Attributes:
        first: number of the first one in the group.
        count: number of them.
        group: number of samples of the whole group.

    Example:
        >>> part = Members(first=2, count=2, group=5)
        >>> part.of(torch.arange(5))
        tensor([2, 3])
        >>> whole, some = (m.noise((m.count, 3), torch.Generator().manual_seed(0)) for m in (Members.all(5), part))
        >>> torch.equal(whole[2:4], some)
        True
    """

    first: int
    count: int
    group: int

    @classmethod
    def all(cls, group: int) -> Members:
        """All samples of a group of this size."""
        return cls(first=0, count=group, group=group)

    @classmethod
    def of_task(cls, task: GroupTask, group: int) -> Members:
        """The samples that a task is for, of a group of this size."""
        first, end = task.members or (0, group)
        return cls(first=first, count=end - first, group=group)

    def of(self, values: Tensor) -> Tensor:
        """Their values of those of the whole group, ``[group, ...]``."""
        return values.narrow(0, self.first, self.count)

    def noise(self, shape: Sequence[int], generator: torch.Generator, dim: int = 0) -> Tensor:
        """Standard normal numbers of a shape whose dimension ``dim`` is these samples, drawn for the whole group."""
        whole = [*shape[:dim], self.group, *shape[dim + 1 :]]
        return torch.randn(whole, generator=generator).narrow(dim, self.first, self.count)

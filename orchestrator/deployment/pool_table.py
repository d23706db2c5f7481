"""The table of a recipe's pools: how many members each has and what each takes. Manifests and checks follow it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from euphonium.config import RunConfig
from euphonium.config.pools import ShareConfig

_ANY_OF = re.compile(r"in\((.*)\)")


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """One pool.

    Attributes:
        role: its name among ``pools``.
        members: actors, or ranks.
        share: what each takes.
        reads: files and folders that each reads, as the recipe names them.
    """

    role: str
    members: int
    share: ShareConfig
    reads: tuple[str, ...] = ()

    def demand(self, resource: str) -> float:
        """How much of a resource all members take."""
        return self.members * self.share.reserved.get(resource, 0.0)

    def room_on(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> int:
        """How many members a node has room for that is otherwise free."""
        if not matches(self.share.labels, labels):
            return 0
        reserved = self.share.reserved
        fits = (math.floor(resources.get(name, 0.0) / amount + 1e-9) for name, amount in reserved.items())
        return min(fits, default=self.members)


def pool_table(config: RunConfig) -> list[PoolRow]:
    """The pools of a recipe, the learner group first."""
    pools, process = config.pools, config.rewards.process
    model = [config.model.path]
    stored = [] if config.prompts.embeddings is None else [str(config.prompts.embeddings)]
    rows = [
        PoolRow(role="learner", members=pools.learner.num_workers, share=pools.learner, reads=tuple(model)),
        PoolRow(role="rollout", members=pools.rollout.num_actors, share=pools.rollout, reads=(*model, *stored)),
    ]
    if process is not None:
        reads = (*model, str(process.path))
        rows.append(PoolRow(role="prm", members=pools.prm.num_actors, share=pools.prm, reads=reads))
        if process.refresh is not None:
            rows.append(PoolRow(role="prm_refresh", members=1, share=pools.refresh_pool, reads=reads))
    rows.append(PoolRow(role="orm", members=pools.orm.num_actors, share=pools.orm, reads=tuple(model)))
    return rows


def total_demand(config: RunConfig) -> dict[str, float]:
    """What all pools of a recipe take together, by resource."""
    rows = pool_table(config)
    return {name: sum(row.demand(name) for row in rows) for row in rows for name in row.share.reserved}


def matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node's labels meet conditions, with Ray's operators: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``."""
    return all(_meets(condition, labels.get(name)) for name, condition in wanted.items())


def _meets(condition: str, value: str | None) -> bool:
    negated = condition.startswith("!")
    plain = condition.removeprefix("!")
    several = _ANY_OF.fullmatch(plain)
    allowed = [part.strip() for part in several[1].split(",")] if several else [plain]
    return (value in allowed) != negated

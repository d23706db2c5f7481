"""The last groups of an iteration, drawn in parts where they would leave rollout actors idle (``rollout.split_tail``).

Actors draw an iteration's groups in waves. Where the groups are no multiple of the actors, the last wave is incomplete:
its groups are then cut, and all actors draw parts of them. How they are cut follows from the recipe alone, never from
who is idle: the passes of a part are smaller than those of a whole group, which changes the last bits, and a retry, a
restart or a resumed run has to repeat its numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from euphonium.config import RolloutConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Tail:
    """How an iteration ends.

    Attributes:
        groups: number of its last groups that are drawn in parts.
        parts: half-open ranges of the samples of each such group; none where groups are drawn whole.
        waves: how long drawing takes, in the time that an actor takes for a whole group.
    """

    groups: int
    parts: tuple[tuple[int, int], ...]
    waves: float


def tail_of(groups: int, actors: int, group_size: int, piece: int) -> Tail:
    """The shortest tail: of the numbers of parts that are equally good, the smallest.

    Args:
        groups: groups of an iteration.
        actors: rollout actors.
        group_size: samples of a group.
        piece: samples that stay together: those of a pass, so that passes stay as large as they were.

    Example:
        >>> tail_of(groups=6, actors=4, group_size=8, piece=1)
        Tail(groups=2, parts=((0, 4), (4, 8)), waves=1.5)
        >>> tail_of(groups=8, actors=4, group_size=8, piece=1)
        Tail(groups=0, parts=(), waves=2.0)
    """
    whole, rest = divmod(groups, actors)
    pieces = -(-group_size // piece)

    def cut(count: int) -> tuple[tuple[int, int], ...]:
        return tuple(itertools.pairwise(min(piece * (pieces * i // count), group_size) for i in range(count + 1)))

    def samples_in_turn(count: int) -> int:
        return -(-rest * count // actors) * max(end - first for first, end in cut(count))

    count = min(range(1, pieces + 1), key=samples_in_turn)
    if rest == 0 or count == 1:
        return Tail(groups=0, parts=(), waves=float(-(-groups // actors)))
    return Tail(groups=rest, parts=cut(count), waves=whole + samples_in_turn(count) / group_size)


def piece_of(rollout: RolloutConfig) -> int:
    """Samples of a group that are always drawn together; all of them where groups are not cut."""
    if not rollout.split_tail:
        return rollout.group_size
    together = rollout.samples_per_pass
    # What is left to the plan is chosen before anything is drawn.
    return together if together != "auto" and together < rollout.group_size else 1


def tail_of_recipe(config: RunConfig) -> Tail:
    """The tail of a recipe's iterations."""
    rollout, actors = config.rollout, config.pools.rollout.num_actors
    return tail_of(rollout.prompts_per_iteration, actors, rollout.group_size, piece_of(rollout))

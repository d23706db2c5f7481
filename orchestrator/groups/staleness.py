"""How far drawing may run ahead of training, as functions of plain numbers.

Iteration ``j`` (from 0) trains the policy from version ``j`` to version ``j + 1``. A group drawn for iteration ``j``
by version ``v`` is ``j - v`` versions stale when it is trained. Drawing ahead is bounded twice: in staleness, because
importance ratios correct for an older policy only so far, and in what is held, because trajectories take memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of drawing ahead.

    Attributes:
        max_staleness: versions by which a group may lag behind the policy that it trains; 0 is strictly on-policy.
        groups: number of groups, being drawn or finished, up to which groups for later iterations may be started.
        nbytes: bytes up to which they may be started.
    """

    max_staleness: int
    groups: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """Groups that have been started and not yet been trained on.

    Attributes:
        groups: their number.
        nbytes: their size; groups that are being drawn count as much as the largest so far.
        each: expected size of one more, in bytes.
    """

    groups: int
    nbytes: int
    each: int


def may_start(iteration: int, version: int, max_staleness: int) -> bool:
    """Whether groups for an iteration may be drawn when the policy has been trained to ``version``."""
    return version <= iteration <= version + max_staleness


def may_draw(iteration: int, version: int, bounds: Bounds, held: Held) -> bool:
    """Whether one more group for an iteration may be started when the policy has been trained to ``version``.

    Groups of the iteration that is trained next always may: without them nothing that is held can ever be trained.

    Example:
        >>> bounds = Bounds(max_staleness=1, groups=4, nbytes=100)
        >>> full = Held(groups=4, nbytes=40, each=10)
        >>> may_draw(iteration=7, version=7, bounds=bounds, held=full)  # of the next iteration
        True
        >>> may_draw(iteration=8, version=7, bounds=bounds, held=full)  # one ahead, but the buffer is full
        False
        >>> may_draw(iteration=8, version=7, bounds=bounds, held=Held(groups=3, nbytes=30, each=10))
        True
        >>> may_draw(iteration=9, version=7, bounds=bounds, held=Held(groups=0, nbytes=0, each=10))  # too far ahead
        False
    """
    if not may_start(iteration, version, bounds.max_staleness):
        return False
    if iteration == version:
        return True
    return held.groups + 1 <= bounds.groups and held.nbytes + held.each <= bounds.nbytes


def staleness(iteration: int, policy_version: int) -> int:
    """Versions by which a group drawn by ``policy_version`` lags when its iteration (from 0) is trained.

    >>> staleness(iteration=7, policy_version=7), staleness(iteration=8, policy_version=7)
    (0, 1)
    """
    return iteration - policy_version

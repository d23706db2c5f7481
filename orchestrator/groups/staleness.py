"""How far drawing may run ahead of training: the rule, as a function of plain numbers.

Iteration ``j`` (from 0) trains the policy from version ``j`` to version ``j + 1``. A group drawn for iteration ``j``
by version ``v`` is ``j - v`` versions stale when it is trained. Drawing ahead is bounded twice: in staleness, because
the objective trusts old log-probabilities only so far, and in what waits, because trajectories take memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of drawing ahead.

    Attributes:
        max_staleness: versions by which a group may lag behind the policy that it trains; 0 is strictly on-policy.
        groups: groups that may be held, under way or finished, for later iterations than the next.
        nbytes: bytes that all held groups may take before drawing ahead pauses.
    """

    max_staleness: int
    groups: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """Groups that have been begun and not yet been trained on.

    Attributes:
        groups: their number.
        nbytes: their size; groups under way count as much as the largest so far.
        each: expected size of one more.
    """

    groups: int
    nbytes: int
    each: int


def may_start(iteration: int, version: int, max_staleness: int) -> bool:
    """Whether groups for an iteration may be drawn when the policy has been trained to ``version``."""
    return version <= iteration <= version + max_staleness


def may_draw(iteration: int, version: int, bounds: Bounds, held: Held) -> bool:
    """Whether one more group for an iteration may be begun.

    Groups of the iteration that is trained next always may: without them nothing that is held can ever be trained.
    """
    if not may_start(iteration, version, bounds.max_staleness):
        return False
    if iteration == version:
        return True
    return held.groups + 1 <= bounds.groups and held.nbytes + held.each <= bounds.nbytes


def staleness(iteration: int, policy_version: int) -> int:
    """Versions by which a group drawn by ``policy_version`` lags when its iteration is trained."""
    return iteration - policy_version

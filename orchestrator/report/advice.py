"""Advice on the pools' sizes, from their busy fractions."""

from __future__ import annotations

from collections.abc import Mapping

IDLE, BUSY = 0.4, 0.8
MEMBER = {"rollout": "rollout actor", "prm": "PRM server", "orm": "ORM server", "learner": "learner rank"}
REMEDY = {
    "rollout": "add rollout actors",
    "prm": "add PRM servers",
    "orm": "add ORM servers",
    "learner": "add learner ranks, or draw larger groups' rows in one micro-batch",
}


def advice(busy: Mapping[str, float], sizes: Mapping[str, int], max_staleness: int) -> str | None:
    """One line on which pool to change; None if no pool is idle.

    Args:
        busy: busy fraction of each pool, by role.
        sizes: number of members of each pool, by role.
        max_staleness: ``rollout.max_staleness``; with 0, rollout and learner wait for each other.
    """
    if "learner" not in busy or "rollout" not in busy:
        return None
    waiting = {role: share for role, share in busy.items() if share < 1 - IDLE}
    idle = ", ".join(f"{role} {1 - share:.0%}" for role, share in sorted(waiting.items(), key=lambda item: item[1]))
    limiting = max(busy, key=lambda role: busy[role])
    if not waiting:
        return None
    if busy[limiting] >= BUSY:
        count, member = sizes[limiting], MEMBER[limiting]
        who = f"{member} holds" if count == 1 else f"{count} {member}s hold"
        return f"idle: {idle}; the {who} up the rest: {REMEDY[limiting]}"
    if max_staleness == 0 and "learner" in waiting and "rollout" in waiting:
        return (
            f"idle: {idle}; rollout and learner wait for each other: rollout.max_staleness=1 lets them overlap, or "
            "more groups an iteration for each rollout actor (rollout.prompts_per_iteration)"
        )
    if "learner" in waiting:
        return f"idle: {idle}; the learner waits for groups: {REMEDY['rollout']}"
    return f"idle: {idle}; these pools can be smaller"

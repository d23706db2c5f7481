"""``euphonium status`` and ``euphonium scale``: looking at a running job, and changing its pools.

Both ask the control desk alone (orchestrator/desk.py), so that a busy run loop never keeps anybody waiting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from euphonium.errors import ConfigError, PreflightError
from euphonium.text_files import quoted
from euphonium.wire.records import RunSnapshot
from orchestrator.pools.ray_session import CONTROL, NAMESPACE

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from euphonium.wire.roles import Desk

ROLES = ("rollout", "prm", "orm", "learner")
ANSWER_TIMEOUT_S = 30.0
_SIZE = re.compile("[1-9][0-9]{0,5}")


def parse_sizes(arguments: Sequence[str]) -> dict[str, int]:
    """Parses sizes of pools such as ``rollout=6``.

    Raises:
        ConfigError: not of that form, or not the name of a pool.
    """
    sizes = {}
    for argument in arguments:
        role, _, number = argument.partition("=")
        if role not in ROLES or not _SIZE.fullmatch(number):
            raise ConfigError(
                f"{quoted(argument)}: a pool and its size are wanted, for example rollout=6; pools: {', '.join(ROLES)}"
            )
        sizes[role] = int(number)
    return sizes


def find_desk(run: str | None) -> tuple[str, ActorProxy[Desk]]:
    """Name and control desk of a run in the connected cluster.

    Args:
        run: name of the run; None if there is only one.

    Raises:
        PreflightError: there is no such run, or several to choose from.
    """
    import ray

    from euphonium.wire.roles import Desk, named_actor

    prefix = NAMESPACE
    runs = {
        actor["namespace"].removeprefix(prefix): actor["namespace"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"] == CONTROL and actor["namespace"].startswith(prefix)
    }
    if run is None and len(runs) == 1:
        (run,) = runs
    if run is None or run not in runs:
        which = f"no run named {quoted(run)}" if run is not None else "no run" if not runs else "more than one run"
        raise PreflightError(f"the cluster has {which}; it has: {', '.join(sorted(runs)) or 'none'}")
    return run, named_actor(Desk, CONTROL, runs[run])


def describe_status(run: str, answer: tuple[RunSnapshot, float] | None) -> str:
    """A snapshot and its age, for people to read."""
    if answer is None:
        return f"{run}: starting"
    status, age_s = answer
    lines = [
        f"{run}: {status.phase}, policy version {status.version} of {status.iterations}"
        + (f" (as of {age_s:.0f} s ago)" if age_s > 5 else ""),
        f"{'pool':<12}{'present':>8}{'wanted':>8}{'working':>9}{'busy':>7}",
    ]
    for role, pool in status.pools.items():
        working = "" if pool.working is None else str(pool.working)
        lines.append(f"{role:<12}{pool.present:>8}{pool.wanted:>8}{working:>9}{pool.busy:>7.0%}")
        absent = [f"{name} {state}" for name, state in pool.members.items() if state != "present"]
        if absent:
            lines.append(f"{'':<12}{', '.join(absent)}")
    lines.append(f"buffer      {status.groups} groups, {status.nbytes / 2**20:.1f} MiB, drawn or under way")
    if status.last:
        lines.append(f"last        {status.last}")
    return "\n".join(lines)

"""Work that commands give to Ray tasks, which write their results to a folder that all nodes share.

Waits for: the tasks; whoever called looks at what they have written meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

POLL_S = 1.0
SAY_EVERY_S = 15.0

_Job = TypeVar("_Job")
_Share = TypeVar("_Share")


def in_tasks(
    work: Callable[[_Job, _Share], None], job: _Job, shares: Sequence[_Share], resources: Mapping[str, Any], name: str
) -> Iterator[None]:
    """Has Ray tasks do a share each; joins a cluster or starts one for it.

    Args:
        work: what a task does. One whose machine dies is tried again, so it leaves out what is written already.
        job: what all tasks get.
        shares: what each of them gets.
        resources: Ray's options, what each reserves.
        name: of the work: ``euphonium-preprocess`` is the namespace of ``preprocess``.

    Yields:
        Again and again until all are done.

    Raises:
        EuphoniumError: a task failed.
    """
    import ray

    from euphonium.wire.deadlines import get
    from euphonium.wire.roles import remote_task
    from orchestrator.pools.ray_session import connect_ray

    joined = ray.is_initialized()
    if not joined:
        connect_ray(f"euphonium-{name}", verbose=False)
    try:
        task = remote_task(work, {"num_cpus": 1, "max_retries": 3, **resources})
        waiting = [task(job, share) for share in shares]
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            get(ready, None, f"the tasks of {name}")
            yield
    finally:
        if not joined:
            ray.shutdown()


class Progress:
    """Says now and then how far a command is.

    Attributes:
        total: number of things to be done.
        what: what they are, with the participle: "clips drawn".
        nothing: what to say while none is done.
    """

    def __init__(self, total: int, what: str, nothing: str, say: Callable[[str], None]) -> None:
        self.total, self.what, self.nothing = total, what, nothing
        self._say = say
        self._began = self._said = time.monotonic()

    def at(self, done: int) -> bool:
        """Says how far it is, if it is time to; returns whether it was."""
        now = time.monotonic()
        if now - self._said <= SAY_EVERY_S:
            return False
        self._said = now
        self._say(self.line(done, now - self._began))
        return True

    def line(self, done: int, seconds: float) -> str:
        """What there is to say after so many seconds."""
        if not done:
            return f"{self.nothing} after {seconds:.0f} s: models are loaded, or tasks wait for their resources"
        left = (self.total - done) / done * seconds
        return f"{done} of {self.total} {self.what}, {done / seconds:.1f} a second, {left / 60:.1f} min left"

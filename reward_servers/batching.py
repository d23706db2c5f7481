"""Dynamic micro-batching: requests that wait at the same time share a forward pass.

Callers wait on the event loop for their answer; the dispatcher waits for requests, then for company to fill a pass
(``wait_ms``), then for the model, which computes in a thread of its own. A bad request fails alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from euphonium.config import RewardPoolConfig
from euphonium.config.base import chosen
from euphonium.errors import EuphoniumError, RewardError
from euphonium.wire.devices import release_unused

log = logging.getLogger(__name__)


class Request(Protocol):
    """A request that can share a forward pass with others."""

    @property
    def size(self) -> int:
        """Number of samples."""
        ...

    @property
    def key(self) -> Hashable:
        """Requests whose keys are equal may share a forward pass."""
        ...

    @property
    def label(self) -> str:
        """Name of the request in errors: its prompt."""
        ...


Q = TypeVar("Q", bound=Request)
A = TypeVar("A")
R = TypeVar("R")
# One answer or error a request, in order; raises if it cannot tell which request is to blame.
Compute = Callable[[Sequence[Q]], Sequence[A | RewardError]]


def isolated(compute: Compute[Q, A], requests: Sequence[Q], what: str) -> list[A | RewardError]:
    """Computes merged requests such that a bad request fails alone.

    If the merged pass raises, all requests are computed once more, each alone; if it returns errors for some, only
    those are. A request that was only spoilt by another one then gets its answer.

    Args:
        compute: the merged pass.
        requests: requests with equal keys.
        what: what computes, for errors: "the process reward model".
    """
    answers: list[A | RewardError] = []
    try:
        answers = list(compute(requests))
    except Exception as error:
        if len(requests) == 1:
            return [_typed(error, requests[0], what)]
        # Its text alone: whoever keeps the record would keep the traceback.
        log.warning("%s failed on %d merged requests, trying each alone: %s", what, len(requests), str(error))
    if not answers:
        # Only outside the handler: the error's traceback keeps the failed pass's activations alive.
        return [isolated(compute, [request], what)[0] for request in requests]
    if len(requests) == 1:
        return answers
    return [
        isolated(compute, [request], what)[0] if isinstance(answer, RewardError) else answer
        for request, answer in zip(requests, answers, strict=True)
    ]


def _typed(error: Exception, request: Request, what: str) -> RewardError:
    if isinstance(error, RewardError):
        return error
    reason = str(error) if isinstance(error, EuphoniumError) else f"{type(error).__name__}: {error}"
    typed = RewardError(f"{what} failed on {request.label!r}: {reason}")
    typed.__cause__ = error
    return typed


@dataclass
class _Waiting(Generic[Q, A]):
    request: Q
    answer: asyncio.Future[A]
    arrived: float
    expires: float


class MicroBatcher(Generic[Q, A]):
    """Merges requests for one model, which computes in a thread of its own.

    The event loop stays free for new requests while the model computes; those that arrive meanwhile share the next
    pass. Before a pass that is not full, it waits up to ``wait_ms``, from the arrival of the first request or the end
    of the pass before, whichever is later: clients that have just got their answers come back together. Requests are
    served in the order of their arrival, except that those with another key wait for the next pass. Without ``merge``
    every request has a pass of its own.

    Attributes:
        worked_s: seconds spent computing since the start.

    Example:
        >>> from types import SimpleNamespace
        >>> def inverses(requests):
        ...     return [1 / request.value for request in requests]
        >>> async def main():
        ...     batcher = MicroBatcher(inverses, "division", RewardPoolConfig())
        ...     requests = [SimpleNamespace(size=1, key=None, label=str(value), value=value) for value in (1, 0, 4)]
        ...     answers = await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)
        ...     await batcher.close()
        ...     return answers
        >>> asyncio.run(main())  # one merged pass, then each alone, since it failed
        [1.0, RewardError("division failed on '0': ZeroDivisionError: division by zero"), 0.25]
    """

    def __init__(self, compute: Compute[Q, A], what: str, pool: RewardPoolConfig) -> None:
        """Creates a batcher; the first request starts its dispatcher.

        Args:
            compute: the merged pass; called in one thread only.
            what: what computes, for errors.
            pool: settings: the number of samples up to which requests are merged (a single request may be larger), the
                wait, and the CPU threads of tensor operations.
        """
        self._compute = compute
        self._what = what
        self._max_batch = chosen(pool.max_batch, "max_batch") if pool.merge else 0
        self._wait_s = pool.wait_ms / 1000
        self._num_gpus = pool.num_gpus
        self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (pool.threads,))
        self._queue: deque[_Waiting[Q, A]] = deque()
        self._arrival = asyncio.Event()
        self._batch: list[_Waiting[Q, A]] = []
        self._dispatcher: asyncio.Task[None] | None = None
        self._finished = float("-inf")
        self.worked_s = 0.0

    async def submit(self, request: Q, deadline_s: float = float("inf")) -> A:
        """Waits for the answer to one request.

        Args:
            request: the request.
            deadline_s: seconds from now after which the answer is of no use; it is then not computed.

        Raises:
            RewardError: the request failed, or waited too long.
        """
        loop = asyncio.get_running_loop()
        if self._dispatcher is None or self._dispatcher.done():
            self._dispatcher = loop.create_task(self._dispatch())
        now = loop.time()
        waiting: _Waiting[Q, A] = _Waiting(request, loop.create_future(), now, now + deadline_s)
        self._queue.append(waiting)
        self._arrival.set()
        return await waiting.answer

    async def run(self, work: Callable[[], R]) -> R:
        """Runs other work in the model's thread, between passes, and waits for its result."""

        def tidily() -> R:
            try:
                return work()
            finally:
                release_unused(self._num_gpus)

        return await asyncio.get_running_loop().run_in_executor(self._thread, tidily)

    async def close(self) -> None:
        """Ends the thread; requests that still wait fail with a RewardError."""
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            await asyncio.gather(self._dispatcher, return_exceptions=True)
        for waiting in [*self._batch, *self._queue]:
            if not waiting.answer.done():
                waiting.answer.set_exception(RewardError(f"{self._what} was closed"))
        self._queue.clear()
        self._thread.shutdown(wait=True)

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            await self._wait_for_others(loop)
            self._batch = self._take(loop.time())
            if not self._batch:
                continue
            requests = [waiting.request for waiting in self._batch]
            began = loop.time()
            try:
                answers = await self.run(partial(isolated, self._compute, requests, self._what))
            finally:
                self._finished = loop.time()
                self.worked_s += self._finished - began
            for waiting, answer in zip(self._batch, answers, strict=True):
                self._deliver(waiting, answer)
            self._batch = []

    async def _wait_for_others(self, loop: asyncio.AbstractEventLoop) -> None:
        """Waits until the first request's pass is full, or ``wait_ms`` is over."""
        first = self._queue[0]
        until = max(first.arrived, self._finished) + self._wait_s
        while (left := until - loop.time()) > 0:
            if sum(w.request.size for w in self._queue if w.request.key == first.request.key) >= self._max_batch:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                return

    def _take(self, now: float) -> list[_Waiting[Q, A]]:
        """Takes the next pass's requests from the queue: the first, and those after it with its key that fit."""
        batch: list[_Waiting[Q, A]] = []
        left: deque[_Waiting[Q, A]] = deque()
        size = 0
        for waiting in self._queue:
            if waiting.answer.done():
                continue
            if waiting.expires < now:
                late = RewardError(f"{self._what} came to {waiting.request.label!r} after its deadline")
                self._deliver(waiting, late)
                continue
            request = waiting.request
            if not batch or (request.key == batch[0].request.key and size + request.size <= self._max_batch):
                batch.append(waiting)
                size += request.size
            else:
                left.append(waiting)
        self._queue = left
        return batch

    def _deliver(self, waiting: _Waiting[Q, A], answer: A | RewardError) -> None:
        if waiting.answer.done():
            return
        if isinstance(answer, RewardError):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)

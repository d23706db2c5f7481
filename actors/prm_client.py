"""Asks PRM servers for rewards and gradients, without waiting before the answer is needed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.arrays import as_tensor
from core.deadlines import describe, remote_error
from core.errors import RewardError
from dynamics import StepTable
from models.generators.base import Conditioning


class PrmClient:
    """One group's view of the pool of PRM servers; a :class:`actors.sampler.ProcessRewardSource`.

    Requests go round the servers. One that is not answered in time, or whose server dies, is sent to the next server;
    after the last attempt it is an error, never a zero.
    """

    def __init__(
        self,
        servers: Sequence[Any],
        conditioning: Conditioning,
        table: StepTable,
        *,
        deadline_s: float,
        attempts: int,
        offset: int = 0,
    ) -> None:
        import ray

        self._servers = itertools.cycle([*servers[offset % len(servers) :], *servers[: offset % len(servers)]])
        # Put once a group: the servers of this node then read it from shared memory at every step.
        self._conditioning = ray.put({name: t.cpu().float().numpy() for name, t in conditioning.items()})
        self._table = table
        self._deadline_s = deadline_s
        self._attempts = attempts

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> _Answer:
        """See :class:`actors.sampler.ProcessRewardSource`."""
        import ray

        state, sigma = ray.put(x.cpu().float().numpy()), float(self._table.sigmas[k])

        def send() -> Any:
            server = next(self._servers)
            return server.reward_and_gradient.remote(state, sigma, self._conditioning, with_gradient)

        return _Answer(send, self._attempts, self._deadline_s, x.device)


class _Answer:
    """An answer under way; a :class:`actors.sampler.Pending`."""

    def __init__(self, send: Any, attempts: int, deadline_s: float, device: torch.device) -> None:
        self._send = send
        self._attempts = attempts
        self._deadline_s = deadline_s
        self._device = device
        self._ref = send()
        self._result: tuple[Tensor, Tensor | None] | None = None

    def result(self) -> tuple[Tensor, Tensor | None]:
        """See :class:`actors.sampler.Pending`.

        Raises:
            RewardError: no server answered with finite numbers.
        """
        if self._result is None:
            rewards, gradient = self._fetch()
            self._result = (
                as_tensor(rewards).to(self._device),
                None if gradient is None else as_tensor(gradient).to(self._device),
            )
        return self._result

    def _fetch(self) -> Any:
        import ray

        reasons = []
        for attempt in range(self._attempts):
            if attempt > 0:
                # A killed server needs a moment to restart; without a pause all attempts are gone before it is back.
                time.sleep(min(2.0**attempt, self._deadline_s / 4))
                self._ref = self._send()
            try:
                return ray.get(self._ref, timeout=self._deadline_s)
            except ray.exceptions.GetTimeoutError:
                reasons.append(f"no answer within {self._deadline_s:.0f} s")
            except ray.exceptions.RayTaskError as error:
                reasons.append(str(remote_error(error, "the PRM server")))
            except ray.exceptions.RayError as error:
                reasons.append(describe(error))
        raise RewardError(
            f"the prm pool did not answer in {self._attempts} attempts: " + "; ".join(reasons)
            + ". Look at the servers' logs (ray logs actor), or raise rewards.deadline_s or pools.prm.num_actors"
        )  # fmt: skip

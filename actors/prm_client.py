"""Asks PRM servers for rewards and gradients, without waiting before the answer is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from euphonium.dynamics import StepTable
from euphonium.generators.conditioning import Conditioning, positive
from euphonium.wire.arrays import as_tensor
from euphonium.wire.records import PrmAnswer
from euphonium.wire.roles import PrmServer
from euphonium.wire.servers import Call, ServerPool

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy


class PrmClient:
    """One group's view of the pool of PRM servers; a :class:`actors.sampler.ProcessRewardSource`.

    Deadline, retries on other servers and the circuit breaker are those of
    :class:`euphonium.wire.servers.ServerPool`; after the last attempt a missing answer is an error, never a zero.
    """

    def __init__(
        self, servers: ServerPool[PrmServer], conditioning: Conditioning, table: StepTable, prompt: str
    ) -> None:
        import ray

        self._servers = servers
        # Put once a group: the servers of this node then read it from shared memory at every step.
        self._conditioning = ray.put({name: t.cpu().float().numpy() for name, t in positive(conditioning).items()})
        self._table = table
        self._prompt = prompt

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> _Answer:
        """See :class:`actors.sampler.ProcessRewardSource`."""
        import ray

        state, sigma = ray.put(x.cpu().float().numpy()), float(self._table.sigmas[k])

        def send(server: ActorProxy[PrmServer]) -> ObjectRef[PrmAnswer]:
            return server.reward_and_gradient.remote(
                state, sigma, self._conditioning, with_gradient, self._prompt, self._servers.deadline_s
            )

        return _Answer(self._servers.begin(send), x.device)


class _Answer:
    """An answer under way; a :class:`actors.sampler.Pending`."""

    def __init__(self, call: Call[PrmServer, PrmAnswer], device: torch.device) -> None:
        self._call = call
        self._device = device
        self._result: tuple[Tensor, Tensor | None] | None = None

    def result(self) -> tuple[Tensor, Tensor | None]:
        """See :class:`actors.sampler.Pending`.

        Raises:
            RewardError: no server answered with finite numbers.
        """
        if self._result is None:
            rewards, gradient = self._call.result()
            self._result = (
                as_tensor(rewards).to(self._device),
                None if gradient is None else as_tensor(gradient).to(self._device),
            )
        return self._result

"""Requests process rewards and gradients from PRM servers, without waiting until the answer is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from actors.sampler import Rewarded
from euphonium.dynamics import StepTable
from euphonium.generators.conditioning import Conditioning, positive
from euphonium.wire.arrays import as_array, as_tensor
from euphonium.wire.clients import RewardClient
from euphonium.wire.later import Later
from euphonium.wire.records import PrmAnswer
from euphonium.wire.roles import PrmServer

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy


class PrmClient:
    """The source of process rewards of one group: PRM servers. Implements :class:`actors.sampler.ProcessRewardSource`.

    Deadlines, retries on other servers and the circuit breaker are those of
    :class:`euphonium.wire.clients.RewardClient`. A request without an answer is an error, never a zero.
    """

    def __init__(
        self, servers: RewardClient[PrmServer], conditioning: Conditioning, table: StepTable, prompt: str
    ) -> None:
        import ray

        self._servers = servers
        # Put once a group: servers on this node read it from shared memory at every step.
        self._conditioning = ray.put({name: as_array(t) for name, t in positive(conditioning).items()})
        self._table = table
        self._prompt = prompt

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Sends the states of step k to a server; waiting for the answer may raise RewardError."""
        import ray

        state, sigma = ray.put(as_array(x.float())), float(self._table.sigmas[k])

        def send(server: ActorProxy[PrmServer]) -> ObjectRef[PrmAnswer]:
            return server.reward_and_gradient.remote(
                state, sigma, self._conditioning, with_gradient, self._prompt, self._servers.deadline_s
            )

        def on_device(answer: PrmAnswer) -> Rewarded:
            rewards, gradient = answer
            moved = None if gradient is None else as_tensor(gradient).to(x.device)
            return as_tensor(rewards).to(x.device), moved

        return self._servers.submit(send).map(on_device)

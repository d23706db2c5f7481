"""PRM servers: process rewards of noisy states and their gradients, for rollout actors in the middle of a step."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from euphonium.config import RunConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.generators.conditioning import Conditioning, expand, positive, stack_conditionings
from euphonium.generators.libraries import import_networks
from euphonium.rewards.process import ProcessRewardModel
from euphonium.role_logs import keep_role_log
from euphonium.wire.arrays import as_tensor
from euphonium.wire.deadlines import node_id
from euphonium.wire.devices import reserved_device
from euphonium.wire.passes import Passes
from euphonium.wire.records import Array, PrmAnswer, Readiness
from euphonium.wire.tracing import Tracer
from reward_servers.batching import MicroBatcher

WHAT = "the process reward model"


@dataclass(frozen=True)
class PrmRequest:
    """States of one prompt at one noise level; implements :class:`reward_servers.batching.Request`.

    Attributes:
        x: float32 ``[samples, *latent]``.
        sigma: noise level.
        conditioning: conditioning of the prompt, with a leading dimension of 1 or of ``samples``.
        with_gradient: whether the gradient is needed too.
        prompt: the text, for errors.
    """

    x: Array
    sigma: float
    conditioning: dict[str, Array]
    with_gradient: bool
    prompt: str = ""

    @property
    def size(self) -> int:
        """Number of states."""
        return len(self.x)

    @property
    def label(self) -> str:
        """The prompt, for errors."""
        return self.prompt

    @cached_property
    def key(self) -> Hashable:
        """States share a pass if their shapes fit and all need the gradient, or none does.

        Prompts of different lengths share one only if the conditioning has a mask, which hides the padding.
        """
        masked = any(name.endswith("mask") for name in self.conditioning)
        shapes = {
            name: array.shape[2 if masked and (array.ndim > 2 or name.endswith("mask")) else 1 :]
            for name, array in self.conditioning.items()
        }
        return self.with_gradient, self.x.shape[1:], tuple(sorted(shapes.items()))


class PrmScorer:
    """The process reward model of a recipe, without Ray."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        if config.rewards.process is None:
            raise ValueError("a PRM server needs rewards.process")
        self.device = device
        self._passes = Passes(config.pools.prm.max_batch, "pools.prm.max_batch")
        self.model = ProcessRewardModel.load(Path(config.rewards.process.path), config.model).to(device)
        self.weights_version = 0

    def load_weights(self, version: int, weights: Mapping[str, Array]) -> None:
        """Replaces the weights by refreshed ones; a pass under way ends with the model that it began with."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({name: as_tensor(array) for name, array in weights.items()})
        self.model, self.weights_version = model, version

    def score(self, requests: Sequence[PrmRequest]) -> list[PrmAnswer | RewardError]:
        """Scores requests of equal keys together, ``max_batch`` samples at a time.

        Returns:
            For every request rewards and gradients, or an error if they are not finite.
        """
        with_gradient = requests[0].with_gradient
        states = torch.cat([as_tensor(request.x) for request in requests]).to(self.device)
        sigmas = torch.tensor(
            [request.sigma for request in requests for _ in range(request.size)], dtype=torch.float32
        ).to(self.device)
        conditioning = stack_conditionings([self._conditioning(request) for request in requests])

        def one_pass(part: slice) -> tuple[Tensor, Tensor | None]:
            read = {name: tensor[part] for name, tensor in conditioning.items()}
            reward, gradient = self._pass(states[part], sigmas[part], read, with_gradient)
            return reward.float().cpu(), None if gradient is None else gradient.float().cpu()

        passes = self._passes.run(len(states), one_pass)
        sizes = [request.size for request in requests]
        rewards = torch.cat([reward for reward, _ in passes]).split(sizes)
        found = [gradient for _, gradient in passes if gradient is not None]
        gradients = torch.cat(found).split(sizes) if found else [None] * len(requests)
        return [_checked(*answer) for answer in zip(requests, rewards, gradients, strict=True)]

    def reward_and_gradient(
        self, x: Array, sigma: float, conditioning: dict[str, Array], with_gradient: bool
    ) -> PrmAnswer:
        """Scores states of one group; the arguments are those of :class:`PrmRequest`.

        Raises:
            NonFiniteRewardError: a reward or gradient is not finite.
        """
        (answer,) = self.score([PrmRequest(x, sigma, conditioning, with_gradient)])
        if isinstance(answer, RewardError):
            raise answer
        return answer

    def _conditioning(self, request: PrmRequest) -> Conditioning:
        tensors = positive({name: as_tensor(array) for name, array in request.conditioning.items()})
        moved = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return expand(moved, request.size)

    def _pass(
        self, states: Tensor, sigmas: Tensor, conditioning: Conditioning, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        if with_gradient:
            return self.model.reward_and_gradient(states, sigmas, conditioning)
        with torch.no_grad():
            return self.model(states, sigmas, conditioning), None


def _checked(request: PrmRequest, rewards: Tensor, gradient: Tensor | None) -> PrmAnswer | RewardError:
    for name, tensor in (("reward", rewards), ("gradient", gradient)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return NonFiniteRewardError(
                f"{WHAT} gave a {name} that is not finite for {request.prompt!r} at sigma {request.sigma:.3f}",
                ["process"],
            )
    return rewards.numpy(), None if gradient is None else gradient.numpy()


class PrmActor:
    """The Ray actor, on asyncio, around a :class:`PrmScorer`, which computes in a thread of its own."""

    def __init__(self, index: int, config: RunConfig) -> None:
        keep_role_log(config.run_dir, f"prm-{index}")
        pool = config.pools.prm
        torch.set_num_threads(pool.threads)
        self.index = index
        import_networks()
        self.scorer = PrmScorer(config, reserved_device(pool.num_gpus))
        self.batcher: MicroBatcher[PrmRequest, PrmAnswer] = MicroBatcher(
            Tracer(config, f"prm-{index}").around(self.scorer.score), WHAT, pool
        )

    def __repr__(self) -> str:
        return f"prm-{self.index}"

    async def ready(self) -> Readiness:
        """Answers once the model is loaded."""
        return Readiness(device=str(self.scorer.device), node=node_id(), busy_s=self.batcher.worked_s)

    async def reward_and_gradient(
        self,
        x: Array,
        sigma: float,
        conditioning: dict[str, Array],
        with_gradient: bool,
        prompt: str = "",
        deadline_s: float = float("inf"),
    ) -> PrmAnswer:
        """Scores one request, together with others that wait; the first arguments are those of :class:`PrmRequest`.

        After ``deadline_s`` seconds the answer is of no use, and is not computed.

        Raises:
            NonFiniteRewardError: a reward or gradient of this request is not finite.
            RewardError: the model failed on it, or its deadline had passed before it was computed.
        """
        request = PrmRequest(np.asarray(x), sigma, conditioning, with_gradient, prompt)
        return await self.batcher.submit(request, deadline_s)

    async def load_weights(self, version: int, weights: dict[str, Array]) -> None:
        """Replaces the weights by those of refresh number ``version``, between two passes."""
        await self.batcher.run(partial(self.scorer.load_weights, version, weights))

    async def weights_version(self) -> int:
        """Number of refreshes that the weights have been through; 0 after a restart."""
        return self.scorer.weights_version

"""Where a group's process rewards and their gradients come from.

Rewards come from PRM servers, gradients from them too, or from SPSA on the outcome rewards; without a process reward
model, SPSA gives both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from torch import Tensor

from actors.members import Members
from actors.prm_client import PrmClient
from actors.sampler import ProcessRewardSource, Rewarded, SourceFactory
from actors.spsa import Score, SpsaSource
from euphonium.config import RunConfig, SpsaConfig
from euphonium.rewards.total import weighted_total
from euphonium.wire.arrays import as_tensor
from euphonium.wire.clients import RewardClient
from euphonium.wire.deadlines import node_id
from euphonium.wire.later import Later
from euphonium.wire.records import GroupTask
from euphonium.wire.roles import Balancer, OrmServer, PrmServer, RolloutContext, ServerRef

if TYPE_CHECKING:
    from ray.actor import ActorProxy

_S = TypeVar("_S")


class GradientsOfAnother:
    """Rewards of one source with the gradients of another. Implements :class:`actors.sampler.ProcessRewardSource`."""

    def __init__(self, rewards: ProcessRewardSource, gradients: ProcessRewardSource) -> None:
        self._rewards = rewards
        self._gradients = gradients

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Requests rewards from the one, and from the other gradients, if they are needed; both are then under way."""
        rewarded = self._rewards.submit(k, x, with_gradient=False)
        if not with_gradient:
            return rewarded
        guiding = self._gradients.submit(k, x, with_gradient=True)
        return Later(lambda: (rewarded.result()[0], guiding.result()[1]))


class EqualStatesOnce:
    """Rewards and gradients of a model that sees a state once where all samples are in the same one.

    Implements :class:`actors.sampler.ProcessRewardSource`; for sources whose answer depends on the state alone.
    """

    def __init__(self, source: ProcessRewardSource) -> None:
        self._source = source

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Requests rewards of the different states."""
        if len(x) == 1 or not bool((x == x[:1]).all()):
            return self._source.submit(k, x, with_gradient=with_gradient)

        def for_all(answer: Rewarded) -> Rewarded:
            rewards, gradient = answer
            return rewards.expand(len(x)), None if gradient is None else gradient.expand_as(x)

        return self._source.submit(k, x[:1], with_gradient=with_gradient).map(for_all)


class RewardSources:
    """One rollout actor's clients of the reward servers, whose circuit breakers last longer than a group."""

    def __init__(self, config: RunConfig, index: int) -> None:
        self._config = config
        # Both pools change while the run goes on: the context of every task says who is in them.
        self._prm_servers: tuple[ServerRef[PrmServer], ...] = ()
        self._orm_servers: tuple[ServerRef[OrmServer], ...] = ()
        self._balancer: ActorProxy[Balancer] | None = None
        self._prm = self._client("prm", lambda: self._prm_servers, index)
        self._orm = self._client("orm", lambda: self._orm_servers, index)

    def _client(
        self, role: Literal["prm", "orm"], members: Callable[[], Sequence[ServerRef[_S]]], index: int
    ) -> RewardClient[_S]:
        return RewardClient(
            role, members, self._config.rewards, offset=index, node=node_id(), balancer=lambda: self._balancer
        )

    def of_group(self, task: GroupTask, context: RolloutContext) -> SourceFactory | None:
        """The factory of a group's source of process rewards; None if the recipe needs none."""
        self._prm_servers, self._orm_servers = context.prm_servers, context.orm_servers
        self._balancer = context.balancer
        guidance, process = self._config.sampler.guidance, self._config.rewards.process
        if guidance is None or guidance.source == "prm":
            return self._prm_source(task) if process is not None else None
        gradients = self._spsa_source(task, guidance.spsa)
        if process is None:
            return gradients
        rewards = self._prm_source(task)
        return lambda *of_group: GradientsOfAnother(rewards(*of_group), gradients(*of_group))

    def _prm_source(self, task: GroupTask) -> SourceFactory:
        return lambda conditioning, table, velocity: EqualStatesOnce(
            PrmClient(self._prm, conditioning, table, task.prompt)
        )

    def _spsa_source(self, task: GroupTask, settings: SpsaConfig) -> SourceFactory:
        score = self._outcome_score(task.prompt)
        members = Members.of_task(task, self._config.rollout.group_size)
        return lambda conditioning, table, velocity: SpsaSource(
            table, velocity, score, perturbations=settings.perturbations, scale=settings.scale, seed=task.seed,
            members=members,
        )  # fmt: skip

    def _outcome_score(self, prompt: str) -> Score:
        config = self._config.rewards
        rewards, timeout, optional = config.outcome, config.deadline_s, config.optional

        def score(latents: Tensor) -> Later[Tensor]:
            prompts, arrays = [prompt] * len(latents), latents.cpu().numpy()
            answer = self._orm.submit(lambda server: server.score.remote(arrays, prompts, timeout, optional))
            totals = answer.map(lambda scores: weighted_total(scores[0], rewards, len(prompts)))
            return totals.map(lambda values: as_tensor(values.astype(np.float32)))

        return score

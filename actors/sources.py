"""Where a group's process rewards and their gradients come from: PRM servers, or SPSA on the outcome rewards."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from actors.prm_client import PrmClient
from actors.sampler import SourceFactory
from actors.spsa import Score, SpsaSource
from euphonium.config import RunConfig
from euphonium.rewards.total import weighted_total
from euphonium.wire.arrays import as_tensor
from euphonium.wire.clients import RewardClient
from euphonium.wire.deadlines import node_id
from euphonium.wire.later import Later
from euphonium.wire.records import GroupTask
from euphonium.wire.roles import OrmServer, PrmServer, RolloutContext, ServerRef


class RewardSources:
    """One rollout actor's clients of the reward servers, whose circuit breakers last longer than a group."""

    def __init__(self, config: RunConfig, index: int) -> None:
        self._config = config
        # Both pools change while the run goes on: the context of every task says who is in them.
        self._prm_servers: tuple[ServerRef[PrmServer], ...] = ()
        self._orm_servers: tuple[ServerRef[OrmServer], ...] = ()
        rewards = config.rewards
        self._prm = RewardClient("prm", lambda: self._prm_servers, rewards, offset=index, node=node_id())
        self._orm = RewardClient("orm", lambda: self._orm_servers, rewards, offset=index)

    def of_group(self, task: GroupTask, context: RolloutContext) -> SourceFactory | None:
        """The factory of a group's source of process rewards; None if the recipe needs none."""
        self._prm_servers, self._orm_servers = context.prm_servers, context.orm_servers
        guidance = self._config.sampler.guidance
        if guidance is not None and guidance.source == "spsa":
            spsa, score = guidance.spsa, self._outcome_score(task.prompt)
            return lambda conditioning, table, velocity: SpsaSource(
                table, velocity, score, perturbations=spsa.perturbations, scale=spsa.scale, seed=task.seed
            )
        if self._config.rewards.process is not None:
            return lambda conditioning, table, velocity: PrmClient(self._prm, conditioning, table, task.prompt)
        return None

    def _outcome_score(self, prompt: str) -> Score:
        rewards, timeout = self._config.rewards.outcome, self._config.rewards.deadline_s

        def score(latents: Tensor) -> Later[Tensor]:
            prompts, arrays = [prompt] * len(latents), latents.cpu().numpy()
            answer = self._orm.submit(lambda server: server.score.remote(arrays, prompts, timeout))
            return answer.map(lambda scores: as_tensor(weighted_total(scores[0], rewards).astype(np.float32)))

        return score

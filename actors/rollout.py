"""Rollout actors: hold a full copy of the policy and draw groups with it, one at a time.

:class:`RolloutWorker` is the plain class that tests construct; :class:`RolloutActor` makes a Ray actor of it. Calls
run one after another, so weights change between trajectories only, and every trajectory belongs to one version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from actors.prm_client import PrmClient
from actors.sampler import (
    ProcessRewardSource,
    Recording,
    SourceFactory,
    UnitGradients,
    Velocity,
    initial_noise,
    sample_deterministic,
    sample_group,
    select_steps,
)
from actors.spsa import Score, SpsaSource
from euphonium.config import GuidanceConfig, RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import TrainingError
from euphonium.generators.generator import Conditioning, expand, images_for, open_generator, stack_conditionings
from euphonium.generators.lora import adapter_parameters, add_adapter
from euphonium.rewards.total import weighted_total
from euphonium.wire.arrays import as_tensor
from euphonium.wire.deadlines import node_id
from euphonium.wire.later import Later
from euphonium.wire.records import (
    Array,
    GroupInfo,
    GroupPayload,
    GroupTask,
    Readiness,
    RolloutContext,
    WeightOrder,
)
from euphonium.wire.roles import OrmServer, PrmServer, WeightDirectory, named_actor
from euphonium.wire.servers import ServerPool
from euphonium.wire.weights.follower import WeightFollower
from euphonium.wire.weights.manifest import load_tensors

if TYPE_CHECKING:
    from ray.actor import ActorProxy

_S = TypeVar("_S")

# Samples in one forward pass of an evaluation.
EVALUATION_BATCH = 16


class RolloutWorker:
    """Draws groups of trajectories with the weights of one policy version."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.family = open_generator(config.model)
        self.transformer = self.family.load_transformer(device)
        if config.model.lora is not None:
            add_adapter(self.transformer, config.model.lora)
            self.published = dict(adapter_parameters(self.transformer))
        else:
            self.published = dict(self.transformer.named_parameters())
        self.transformer.requires_grad_(False)
        encoder = self.family.prompt_encoder(device, images_for(self.family, config.prompts))
        self._encode = lru_cache(maxsize=4096)(lambda prompt: encode_one(encoder, prompt))
        self._tables = lru_cache(maxsize=8)(lambda iteration: self.family.step_table(config.sampler, iteration))
        self.policy_version = 0

    def load_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over published weights and their version.

        Raises:
            TrainingError: names or shapes do not fit the model.
        """
        load_tensors(tensors, self.published)
        self.policy_version = version

    def conditioning(self, prompt: str) -> Conditioning:
        """Conditioning of one prompt, with a leading dimension of 1; encoded once."""
        encoded: Conditioning = self._encode(prompt)
        return encoded

    def table(self, iteration: int = 0) -> StepTable:
        """The sampler of an iteration."""
        built: StepTable = self._tables(iteration)
        return built

    def generate(self, task: GroupTask, make_source: SourceFactory | None) -> tuple[GroupInfo, Array, GroupPayload]:
        """Draws one group.

        Args:
            task: what to draw.
            make_source: source of process rewards and guidance, if the recipe has any.

        Returns:
            What the orchestrator needs to know, the final latents ``[group, *latent]`` for the outcome rewards, and
            the trained transitions for the learner.

        Raises:
            TrainingError: samples that are not finite.
        """
        began = time.perf_counter()
        config, table = self.config, self.table(task.iteration)
        group_size = config.rollout.group_size
        conditioning = self.conditioning(task.prompt)
        start, noise = initial_noise(
            self.family.latent_shape, group_size, task.seed, shared=config.sampler.shared_noise, device=self.device
        )
        velocity = self.velocity(conditioning)
        scored = self._scored_states(table)
        guidance = config.sampler.guidance
        needs_source = bool(scored) or bool(table.guided_steps)
        trajectory = sample_group(
            table,
            velocity,
            start,
            noise,
            Recording(
                steps=select_steps(table, group_size, config.objective.timestep_fraction, task.seed),
                scored_states=scored,
                guided_mean=config.objective.kind == "standard",
            ),
            _guiding(make_source(conditioning, table, velocity), guidance) if make_source and needs_source else None,
        )
        if not bool(torch.isfinite(trajectory.final).all()):
            raise TrainingError(
                f"rollout of {task.prompt!r} with policy version {self.policy_version} is not finite: the policy has "
                "diverged; lower optimizer.learning_rate or sampler.guidance, and resume from an earlier checkpoint"
            )
        payload = GroupPayload(
            states=trajectory.states.numpy(),
            next_states=trajectory.next_states.numpy(),
            steps=trajectory.steps.numpy(),
            log_probs=trajectory.log_probs.numpy(),
            gradients=None if trajectory.gradients is None else trajectory.gradients.numpy(),
            conditioning={name: tensor.cpu().float().numpy() for name, tensor in conditioning.items()},
        )
        info = GroupInfo(
            task=task,
            policy_version=self.policy_version,
            fingerprint=table.fingerprint(),
            transitions=payload.steps.shape[1],
            process_rewards=self._credited(trajectory.process_rewards),
            seconds={**trajectory.seconds, "total": time.perf_counter() - began},
            payload_bytes=payload.nbytes,
        )
        return info, trajectory.final.cpu().numpy(), payload

    def evaluate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        make_source: SourceFactory | None = None,
        guidance: GuidanceConfig | None = None,
    ) -> Array:
        """Deterministic samples, one a prompt and seed: latents ``[len(prompts), *latent]``.

        Args:
            prompts: texts.
            seeds: of their noise.
            make_source: source of guidance, for inference that keeps it.
            guidance: keeps the process-reward gradient in the ODE (``Inference RGG``); None samples without any
                reward model.
        """
        settings = self.config.evaluation
        table = self.family.ode_table(settings.num_steps, self.config.sampler.shift, guidance)
        results = []
        # A source serves one prompt; without one, prompts share a batch.
        size = EVALUATION_BATCH if guidance is None else 1
        for begin in range(0, len(prompts), size):
            part = slice(begin, begin + size)
            conditioning = stack_conditionings([self.conditioning(prompt) for prompt in prompts[part]])
            starts = [
                initial_noise(self.family.latent_shape, 1, seed, shared=False, device=self.device)[0]
                for seed in seeds[part]
            ]
            velocity = self.velocity(conditioning)
            source = None
            if make_source and guidance is not None:
                source = _guiding(make_source(conditioning, table, velocity), guidance)
            results.append(sample_deterministic(table, velocity, torch.cat(starts), source).cpu())
        return torch.cat(results).numpy()

    def velocity(self, conditioning: Conditioning) -> Velocity:
        """The policy's output for samples of one conditioning, or of as many as there are samples."""

        @torch.no_grad()
        def velocity(x: Tensor, time: float) -> Tensor:
            batch = x.shape[0]
            times = torch.full((batch,), time, dtype=torch.float32, device=self.device)
            return self.family.velocity(self.transformer, x, times, expand(conditioning, batch))

        return velocity

    def _scored_states(self, table: StepTable) -> tuple[int, ...]:
        """States whose process reward is wanted for the advantage, beyond those that guidance asks for."""
        process = self.config.rewards.process
        if process is None or process.weight == 0 or self.config.advantage.mode == "outcome":
            return ()
        offset = 1 if process.credit == "next_state" else 0
        # Nothing is credited for a step without noise.
        credited = table.stochastic_steps
        if process.steps == "guided":
            credited = [k for k in credited if k in table.guided_steps]
        return tuple(k + offset for k in credited)

    def _credited(self, rewards: Tensor | None) -> Array | None:
        """Of the rewards of all states, those that the actions are credited with, ``[group, num_steps]``."""
        process = self.config.rewards.process
        if rewards is None or process is None:
            return None
        credited = rewards[:, 1:] if process.credit == "next_state" else rewards[:, :-1]
        return np.ascontiguousarray(credited.numpy())


def _guiding(source: ProcessRewardSource, guidance: GuidanceConfig | None) -> ProcessRewardSource:
    """A source as the recipe wants its gradients."""
    return UnitGradients(source) if guidance is not None and guidance.normalise else source


def encode_one(encoder: Callable[[list[str]], Conditioning], prompt: str) -> Conditioning:
    """Conditioning of one prompt, padded to no other."""
    return dict(encoder([prompt]))


class RolloutActor:
    """A :class:`RolloutWorker` as a Ray actor; the orchestrator makes it with ``ray.remote``."""

    def __init__(self, index: int, config: RunConfig, store: str) -> None:
        torch.set_num_threads(config.pools.rollout.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.index = index
        self.config = config
        self.worker = RolloutWorker(config, device)
        rewards = config.rewards
        outcome = [reward.name for reward in rewards.outcome]
        # Both pools change while the run goes on: every order says who is in them.
        self.prm_servers: list[ActorProxy[PrmServer]] = []
        self.orm_servers: list[ActorProxy[OrmServer]] = []
        self.near: set[ActorProxy[PrmServer]] = set()
        self.prm: ServerPool[PrmServer] = ServerPool(
            "prm", lambda: self.prm_servers, rewards, rewards=["process"], offset=index, near=self.near.__contains__
        )
        self.orm: ServerPool[OrmServer] = ServerPool(
            "orm", lambda: self.orm_servers, rewards, rewards=outcome, offset=index
        )
        self.node = node_id()
        self.weights = WeightFollower(
            named_actor(WeightDirectory, store), self.worker.load_weights, device, config.pools
        )
        self._prm_handles: dict[str, ActorProxy[PrmServer]] = {}
        self._orm_handles: dict[str, ActorProxy[OrmServer]] = {}

    def __repr__(self) -> str:
        return f"rollout-{self.index}"

    def ready(self) -> Readiness:
        """Answers once the models are loaded."""
        return Readiness(device=str(self.worker.device), node=node_id())

    def generate(self, task: GroupTask, context: RolloutContext) -> tuple[GroupInfo, Array, GroupPayload]:
        """See :meth:`RolloutWorker.generate`; called with ``num_returns=3``, so that the caller owns the arrays.

        Newer weights are taken over first if there are any: between trajectories, never within one.

        Raises:
            WeightsMissingError: the weight store does not have the weights.
        """
        pulled = self.weights.follow(context)
        guidance = self.config.sampler.guidance
        factory: SourceFactory | None = None
        if guidance is not None and guidance.source == "spsa":
            self.orm_servers = _find(OrmServer, context.orm_servers, self._orm_handles)
            factory = self._spsa(task, guidance)
        elif self.config.rewards.process is not None:
            self.prm_servers = _find(PrmServer, context.prm_servers, self._prm_handles)
            own = [name for name, node in zip(context.prm_servers, context.prm_nodes, strict=True) if node == self.node]
            self.near.clear()
            self.near.update(_find(PrmServer, own, self._prm_handles))
            factory = self._prm(task.prompt)
        info, latents, payload = self.worker.generate(task, factory)
        return dataclasses.replace(info, seconds={**info.seconds, "weights": pulled}), latents, payload

    def evaluate(self, prompts: Sequence[str], seeds: Sequence[int], context: RolloutContext) -> Array:
        """See :meth:`RolloutWorker.evaluate`."""
        self.weights.follow(context)
        return self.worker.evaluate(prompts, seeds)

    def receive(self, order: WeightOrder) -> None:
        """Takes part in a broadcast of weights.

        Raises:
            LostActorError: the learner or another member is gone; the weights have to be fetched.
        """
        self.weights.receive(order)

    def _prm(self, prompt: str) -> SourceFactory:
        return lambda conditioning, table, velocity: PrmClient(self.prm, conditioning, table, prompt)

    def _spsa(self, task: GroupTask, guidance: GuidanceConfig) -> SourceFactory:
        return lambda conditioning, table, velocity: SpsaSource(
            table,
            velocity,
            self._outcome_score(task.prompt),
            perturbations=guidance.spsa.perturbations,
            scale=guidance.spsa.scale,
            seed=task.seed,
        )

    def _outcome_score(self, prompt: str) -> Score:
        rewards, timeout = self.config.rewards.outcome, self.config.rewards.deadline_s

        def score(latents: Tensor) -> Later[Tensor]:
            prompts, arrays = [prompt] * len(latents), latents.cpu().numpy()
            call = Later(self.orm.begin(lambda server: server.score.remote(arrays, prompts, timeout)).result)
            return call.map(lambda answer: as_tensor(weighted_total(answer[0], rewards).astype(np.float32)))

        return score


def _find(role: type[_S], names: Sequence[str], known: dict[str, ActorProxy[_S]]) -> list[ActorProxy[_S]]:
    """Handles of those servers of a pool that there are; ``known`` keeps them."""
    for name in names:
        if name not in known:
            with contextlib.suppress(ValueError):
                known[name] = named_actor(role, name)
    return [known[name] for name in names if name in known]

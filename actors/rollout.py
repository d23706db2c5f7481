"""Rollout actors: each holds a full copy of the policy and draws one group at a time, or a part of one.

:class:`RolloutWorker` does the work and knows no Ray; :class:`RolloutActor` is the Ray actor around it, which keeps its
weights up to date and gives it a source of process rewards. Calls run one after another, so weights change only
between groups, and every trajectory is drawn by one policy version.

Waits for: newer weights, before a group; PRM servers, at every step; ORM servers, with guidance by SPSA.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from actors.drawn import credited_rewards, final_rewards, leave_one_state, payload_of, put_together
from actors.guidance import ScaledGradients
from actors.members import Members
from actors.sampler import (
    ProcessRewardSource,
    Recording,
    SourceFactory,
    Velocity,
    initial_noise,
    sample_deterministic,
    sample_group,
    scored_states,
)
from actors.sleeper import Sleeper
from actors.sources import RewardSources
from actors.training_rows import noised_again, state_places, trained_steps
from actors.velocity import Reuse, velocity_in_passes
from euphonium.config import GuidanceConfig, RunConfig, SamplerConfig
from euphonium.dynamics import StepTable
from euphonium.errors import TrainingError
from euphonium.generators.conditioning import CACHE_BYTES, Conditioning, ConditioningCache, stack_conditionings
from euphonium.generators.embeddings import stored_encoder
from euphonium.generators.feature_cache import FeatureCache
from euphonium.generators.generator import images_for
from euphonium.generators.libraries import import_networks
from euphonium.generators.lora import adapter_parameters, add_adapter
from euphonium.generators.registry import open_generator
from euphonium.role_logs import keep_role_log
from euphonium.wire.deadlines import node_id
from euphonium.wire.devices import release_unused, reserved_device
from euphonium.wire.passes import Passes
from euphonium.wire.records import Array, GroupInfo, GroupPayload, GroupTask, Readiness, WeightOrder
from euphonium.wire.roles import RolloutContext, WeightDirectory, named_actor
from euphonium.wire.tracing import Tracer
from euphonium.wire.weights.follower import WeightFollower
from euphonium.wire.weights.manifest import load_tensors

# Step tables that are kept: windows that are drawn for every group have as many places as there are steps.
TABLES = 64

log = logging.getLogger(__name__)


class RolloutWorker:
    """Draws groups and evaluation samples with the weights that it holds."""

    def __init__(self, config: RunConfig, device: torch.device, *, asleep: bool = False) -> None:
        """Loads the models.

        Args:
            config: configuration of the run.
            device: where to compute.
            asleep: whether the policy begins in host memory, and :meth:`wake` brings it to the device.
        """
        self.config = config
        self.device = device
        self.family = open_generator(config.model)
        self.transformer = self.family.load_transformer(torch.device("cpu") if asleep else device)
        if config.model.lora is not None:
            add_adapter(self.transformer, config.model.lora)
            self.published = dict(adapter_parameters(self.transformer))
        else:
            named = self.transformer.named_parameters()
            self.published = {name: parameter for name, parameter in named if self.family.trains(name)}
        self.transformer.requires_grad_(False)
        if config.rollout.compile:
            self.family.compile_blocks(self.transformer)
        self.cache = FeatureCache(self.transformer) if config.reuse_fields else None
        self._sleeper = Sleeper(self.transformer, device)
        if asleep:
            self._sleeper.sleep()
        encoding = torch.device("cpu") if config.pools.rollout.encode_on_cpu else device
        stored = stored_encoder(config.prompts.embeddings, self.family)
        encoder = self.family.prompt_encoder(encoding, images_for(self.family, config.prompts), stored)
        self._conditionings = ConditioningCache(lambda prompt: encode_one(encoder, prompt), CACHE_BYTES)
        self._tables: dict[tuple[object, ...], StepTable] = {}
        self.passes = Passes(config.rollout.samples_per_pass, "rollout.samples_per_pass")
        self.policy_version = 0

    def sleep(self) -> None:
        """Moves the policy to host memory, until :meth:`wake`."""
        self._sleeper.sleep()

    def wake(self) -> None:
        """Brings the policy back to the device, if it sleeps; to be called before anything that computes with it."""
        self._sleeper.wake()

    def load_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Loads published weights, and notes their version.

        Raises:
            TrainingError: names or shapes do not fit the model.
        """
        load_tensors(tensors, self.published)
        self.policy_version = version

    def conditioning(self, prompt: str) -> Conditioning:
        """Conditioning of one prompt, with a leading dimension of 1; cached."""
        return {name: tensor.to(self.device) for name, tensor in self._conditionings.of(prompt).items()}

    def table(self, iteration: int = 0) -> StepTable:
        """The step table of an iteration (from 0), by which the transitions of all its groups are scored; cached."""
        return self._table_of(iteration, self.config.sampler)

    def _table_of_group(self, task: GroupTask) -> StepTable:
        """The step table by which a group is drawn; its window may be the group's own."""
        return self._table_of(task.iteration, self.config.sampler.of_group(task.group_id))

    def _table_of(self, iteration: int, sampler: SamplerConfig) -> StepTable:
        key = (iteration, sampler.window(iteration), isinstance(sampler.sde_window, tuple))
        if key not in self._tables:
            while len(self._tables) >= TABLES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = self.family.step_table(sampler, iteration)
        return self._tables[key]

    def generate(self, task: GroupTask, make_source: SourceFactory | None) -> tuple[GroupInfo, Array, GroupPayload]:
        """Draws one group, or the samples of it that the task is for.

        Args:
            task: prompt, seed and iteration.
            make_source: makes the source of process rewards and gradients, if the recipe has any.

        Returns:
            A description for the orchestrator, the final latents ``[group, *latent]`` for the outcome rewards, and the
            trained transitions for the learner.

        Raises:
            TrainingError: samples are not finite.
        """
        began = time.perf_counter()
        config = self.config
        table = self._table_of_group(task)
        conditioning = self.conditioning(task.prompt)
        shape, size, shared = self.family.latent_shape, config.rollout.group_size, config.sampler.shared_noise
        members = Members.of_task(task, size)
        start, noise = initial_noise(shape, size, task.seed, shared=shared, device=self.device)
        velocity = self.velocity(conditioning)
        scored = scored_states(self.config, table)
        guidance = config.sampler.guidance
        needs_source = bool(scored) or bool(table.guided_steps)
        steps, noises = members.of(trained_steps(config, table, task.seed)), config.objective.noises_samples
        recording = Recording(
            steps=steps[:, :0] if noises else steps,
            scored_states=scored,
            guided_mean=config.objective.kind == "standard",
            keep_gradients=config.objective.keeps_gradients,
        )
        source = None
        if make_source and needs_source:
            source = _guiding(make_source(conditioning, table, velocity), guidance, table, task.strength, members)
        exact = [float(table.times[k]) for k in table.stochastic_steps]
        with self._reusing(config.rollout.reuse_below, exact) as reuse:
            walked = self.velocity(conditioning, reuse)
            trajectory = sample_group(table, walked, members.of(start), noise, recording, source, members)
        if not bool(torch.isfinite(trajectory.final).all()):
            raise TrainingError(
                f"rollout of {task.prompt!r} with policy version {self.policy_version} is not finite: the policy has "
                "diverged; lower optimizer.learning_rate or sampler.guidance, and resume from an earlier checkpoint"
            )
        if noises:
            trajectory = noised_again(config, trajectory, table, steps, task.seed, members)
        payload = payload_of(trajectory, conditioning)
        final = self.family.finish(trajectory.final, conditioning)
        info = GroupInfo(
            task=task,
            policy_version=self.policy_version,
            fingerprint=self.table(task.iteration).fingerprint(),
            rows=payload.rows,
            process_rewards=credited_rewards(config, trajectory.process_rewards, table),
            final_rewards=final_rewards(config, trajectory.process_rewards),
            seconds={**trajectory.seconds, "total": time.perf_counter() - began},
            payload_bytes=payload.nbytes,
            reused=0.0 if reuse is None else reuse.share,
        )
        return info, final.cpu().numpy(), payload

    def merge(
        self, infos: Sequence[GroupInfo], latents: Sequence[Array], payloads: Sequence[GroupPayload]
    ) -> tuple[GroupInfo, Array, GroupPayload]:
        """What :meth:`generate` returns of a whole group, from what it returned of its parts, in their order.

        Raises:
            TrainingError: the parts were drawn by different policy versions.
        """
        table = self._table_of_group(infos[0].task)
        alike = all(leave_one_state(payloads, k) for k in table.stochastic_steps[:1])
        return put_together(infos, latents, payloads, partial(state_places, self.config, table, alike=alike))

    def evaluate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        make_source: SourceFactory | None = None,
        guidance: GuidanceConfig | None = None,
    ) -> Array:
        """Deterministic samples, one a prompt and seed: latents ``[len(prompts), *latent]``.

        Args:
            prompts: one text a sample.
            seeds: seed of each sample's noise.
            make_source: makes the source of gradients, if there is guidance.
            guidance: adds the process-reward gradient to the ODE (``Inference RGG``); None samples the policy alone.
        """
        settings = self.config.evaluation
        table = self.family.ode_table(settings.num_steps, self.config.sampler, guidance)

        def samples(part: slice) -> Tensor:
            conditioning = stack_conditionings([self.conditioning(prompt) for prompt in prompts[part]])
            starts = [
                initial_noise(self.family.latent_shape, 1, seed, shared=False, device=self.device)[0]
                for seed in seeds[part]
            ]
            velocity = self.velocity(conditioning)
            source = None
            if make_source and guidance is not None:
                # Samples of an evaluation are no members of a group.
                alone = guidance.model_copy(update={"strengths": (1.0,)})
                source = _guiding(make_source(conditioning, table, velocity), alone, table, strength=1.0)
            with self._reusing(settings.reuse_below) as reuse:
                walked = self.velocity(conditioning, reuse)
                final = sample_deterministic(table, walked, torch.cat(starts), source)
            return self.family.finish(final, conditioning).cpu()

        # A source of gradients is for one prompt; without one, prompts share a pass.
        passes = self.passes if guidance is None else Passes(1, "rollout.samples_per_pass")
        return torch.cat(passes.run(len(prompts), samples)).numpy()

    def velocity(self, conditioning: Conditioning, reuse: Reuse | None = None) -> Velocity:
        """The policy's output as a function of state and time, for a conditioning of one prompt or of one a sample.

        Args:
            conditioning: the conditioning.
            reuse: which passes may reuse what the last one computed; None for exact ones.
        """
        return velocity_in_passes(self.family, self.transformer, conditioning, self.passes, reuse)

    @contextmanager
    def _reusing(self, threshold: float | None, exact: Collection[float] = ()) -> Iterator[Reuse | None]:
        """What passes over new samples may reuse, None if nothing; afterwards nothing of them is kept."""
        if self.cache is None or threshold is None:
            yield None
            return
        try:
            yield Reuse(self.cache, threshold, frozenset(exact))
        finally:
            self.cache.forget()


def _guiding(
    source: ProcessRewardSource,
    guidance: GuidanceConfig | None,
    table: StepTable,
    strength: float,
    members: Members | None = None,
) -> ProcessRewardSource:
    """The source, with gradients scaled as the recipe and the task want."""
    return source if guidance is None else ScaledGradients(source, guidance, table, strength, members)


def encode_one(encoder: Callable[[list[str]], Conditioning], prompt: str) -> Conditioning:
    """Conditioning of one prompt, encoded alone, so that it is not padded to the length of others."""
    return dict(encoder([prompt]))


class RolloutActor:
    """The Ray actor around a :class:`RolloutWorker`."""

    def __init__(
        self,
        index: int,
        config: RunConfig,
        store: str,
        make_worker: Callable[[RunConfig, torch.device], RolloutWorker] | None = None,
    ) -> None:
        """Loads the models.

        Args:
            index: index of the actor in its pool.
            config: configuration of the run.
            store: name of the weight store's actor.
            make_worker: constructs the worker, where tests and benchmarks want a cheaper one.
        """
        keep_role_log(config.run_dir, f"rollout-{index}")
        torch.set_num_threads(config.pools.rollout.threads)
        device = reserved_device(config.pools.rollout.num_gpus)
        self.index = index
        if make_worker is not None:
            self.worker = make_worker(config, device)
        else:
            import_networks()
            # One that Ray restarts may come back while the learner works on the same GPU.
            self.worker = RolloutWorker(config, device, asleep=config.pools.rollout.sleep)
        directory = named_actor(WeightDirectory, store)
        self.weights = WeightFollower(directory, self.worker.load_weights, device, config.pools)
        self._pool = config.pools.rollout
        self.sources = RewardSources(config, index)
        self._tracer = Tracer(config, f"rollout-{index}")

    def __repr__(self) -> str:
        return f"rollout-{self.index}"

    def ready(self) -> Readiness:
        """Answers once the models are loaded."""
        return Readiness(device=str(self.worker.device), node=node_id())

    def generate(self, task: GroupTask, context: RolloutContext) -> tuple[GroupInfo, Array, GroupPayload]:
        """Draws a group, or a part of one, with newer weights if the context asks for them.

        Called with ``num_returns=3``, so that the caller owns the arrays (:func:`euphonium.wire.roles.generate_group`).

        Raises:
            WeightsMissingError: the weight store does not have the weights.
            RewardError: no server returned the process rewards.
            TrainingError: samples are not finite.
        """
        with self._awake():
            pulled = self.weights.follow(context)
            with self._tracer.unit():
                info, latents, payload = self.worker.generate(task, self.sources.of_group(task, context))
        log.info("drew %s of iteration %d, version %d", task, task.iteration + 1, info.policy_version)
        return dataclasses.replace(info, seconds={**info.seconds, "weights": pulled}), latents, payload

    def merge(self, infos: Sequence[GroupInfo], *arrays: Array | GroupPayload) -> tuple[GroupInfo, Array, GroupPayload]:
        """Puts a group together that was drawn in parts; returned like those of :meth:`generate`.

        Args:
            infos: descriptions of the parts, in the order of their samples.
            arrays: the latents of all parts, then the transitions of all.

        Raises:
            TrainingError: the parts were drawn by different policy versions.
        """
        latents = [part for part in arrays if not isinstance(part, GroupPayload)]
        return self.worker.merge(infos, latents, [part for part in arrays if isinstance(part, GroupPayload)])

    def evaluate(self, prompts: Sequence[str], seeds: Sequence[int], context: RolloutContext) -> Array:
        """Deterministic samples with the context's weights: latents ``[len(prompts), *latent]``, one a prompt and seed.

        Raises:
            WeightsMissingError: the weight store does not have the weights.
        """
        with self._awake():
            self.weights.follow(context)
            return self.worker.evaluate(prompts, seeds)

    def receive(self, order: WeightOrder) -> None:
        """Receives the weights of a broadcast.

        Raises:
            LostActorError: the learner or another member is gone; the weights must be fetched from the store.
        """
        self.weights.receive(order)

    def sleep(self) -> None:
        """Leaves the GPU until the next group or evaluation."""
        self.worker.sleep()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self._pool.sleep:
            self.worker.wake()
        try:
            yield
        finally:
            release_unused(self._pool.num_gpus)

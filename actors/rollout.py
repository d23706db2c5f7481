"""Rollout actors: hold a full copy of the policy and draw groups with it, one at a time.

:class:`RolloutWorker` is the plain class that tests construct; :class:`RolloutActor` makes a Ray actor of it. Calls
run one after another, so weights change between trajectories only, and every trajectory belongs to one version.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.prm_client import PrmClient
from actors.sampler import ProcessRewardSource, initial_noise, sample_group, sample_ode, select_steps
from core.config import RunConfig
from core.deadlines import get
from core.errors import TrainingError
from core.records import Array, GroupInfo, GroupPayload, GroupTask
from core.weights import WeightManifest, load_buckets
from dynamics import shifted_sigmas
from models.generators.base import Conditioning, expand, open_generator

# Samples in one forward pass of an evaluation.
EVALUATION_BATCH = 16


class RolloutWorker:
    """Draws groups of trajectories with the weights of one policy version."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.family = open_generator(config.model)
        self.transformer = self.family.load_transformer(device).requires_grad_(False)
        encoder = self.family.load_prompt_encoder(device)
        self._encode = lru_cache(maxsize=4096)(lambda prompt: encode_one(encoder, prompt))
        self.table = config.sampler.table()
        self.policy_version = 0

    def load_weights(self, manifest: WeightManifest, buckets: Sequence[Any]) -> None:
        """Takes over published weights and their version."""
        load_buckets(manifest, buckets, dict(self.transformer.named_parameters()))
        self.policy_version = manifest.version

    def conditioning(self, prompt: str) -> Conditioning:
        """Text conditioning of one prompt, with a leading dimension of 1; encoded once."""
        encoded: Conditioning = self._encode(prompt)
        return encoded

    def generate(
        self, task: GroupTask, process_reward: ProcessRewardSource | None
    ) -> tuple[GroupInfo, Array, GroupPayload]:
        """Draws one group.

        Returns:
            What the orchestrator needs to know, the final latents ``[group, *latent]`` for the outcome rewards, and
            the trained transitions for the learner.
        """
        began = time.perf_counter()
        config = self.config
        group_size = config.rollout.group_size
        conditioning = self.conditioning(task.prompt)
        start, noise = initial_noise(
            self.family.latent_shape, group_size, task.seed, shared=config.sampler.shared_noise, device=self.device
        )
        process = config.rewards.process
        standard = config.objective.kind == "standard"
        trajectory = sample_group(
            self.table,
            self._velocity(conditioning, group_size),
            start,
            noise,
            kept_steps=select_steps(self.table, group_size, config.objective.timestep_fraction, task.seed),
            process_reward=process_reward,
            score_all_steps=process is not None and process.weight != 0,
            guided_mean_in_log_prob=standard,
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
        rewards = trajectory.process_rewards
        info = GroupInfo(
            task=task,
            policy_version=self.policy_version,
            fingerprint=self.table.fingerprint(),
            process_rewards=None if rewards is None else rewards.numpy(),
            seconds={**trajectory.seconds, "total": time.perf_counter() - began},
            payload_bytes=payload.nbytes,
        )
        return info, trajectory.final.cpu().numpy(), payload

    def evaluate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Array:
        """ODE samples, one a prompt and seed, without any reward model: latents ``[len(prompts), *latent]``."""
        sigmas = shifted_sigmas(self.config.evaluation.num_steps, self.config.sampler.shift)
        results = []
        for begin in range(0, len(prompts), EVALUATION_BATCH):
            part = slice(begin, begin + EVALUATION_BATCH)
            conditioning = stack_conditionings([self.conditioning(prompt) for prompt in prompts[part]])
            starts = [
                initial_noise(self.family.latent_shape, 1, seed, shared=False, device=self.device)[0]
                for seed in seeds[part]
            ]
            start = torch.cat(starts)
            results.append(sample_ode(sigmas, self._velocity(conditioning, len(start)), start).cpu())
        return torch.cat(results).numpy()

    def _velocity(self, conditioning: Conditioning, batch: int) -> Any:
        expanded = expand(conditioning, batch)

        @torch.no_grad()
        def velocity(x: Tensor, sigma: float) -> Tensor:
            sigmas = torch.full((batch,), sigma, dtype=torch.float32, device=self.device)
            return self.family.velocity(self.transformer, x, sigmas, expanded)

        return velocity


def encode_one(encoder: Any, prompt: str) -> Conditioning:
    """Conditioning of one prompt, padded to no other."""
    return dict(encoder([prompt]))


def stack_conditionings(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch of conditionings that may differ in length: shorter ones are padded with zeros, masked out."""
    stacked: Conditioning = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].dim() > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [torch.cat([t, t.new_zeros(1, longest - t.shape[1], *t.shape[2:])], dim=1) for t in tensors]
        stacked[name] = torch.cat(tensors)
    return stacked


class RolloutActor:
    """A :class:`RolloutWorker` as a Ray actor; the orchestrator makes it with ``ray.remote``."""

    def __init__(self, index: int, config: RunConfig, prm_servers: Sequence[str], store: str) -> None:
        import ray

        torch.set_num_threads(config.pools.rollout.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.index = index
        self.config = config
        self.worker = RolloutWorker(config, device)
        # By name: a restarted actor finds the others again, which it could not by handles in its arguments.
        self.prm_servers = [ray.get_actor(name) for name in prm_servers]
        self.store = ray.get_actor(store)

    def __repr__(self) -> str:
        return f"rollout-{self.index}"

    def ready(self) -> dict[str, Any]:
        """Answers once the models are loaded."""
        return {"policy_version": self.worker.policy_version, "device": str(self.worker.device)}

    def update_weights(self, version: int, kind: str = "policy") -> float:
        """Pulls published weights from the store.

        Returns:
            Seconds that it took.
        """
        began = time.perf_counter()
        timeout = self.config.pools.start_timeout_s
        manifest, refs = get(self.store.fetch.remote(version, kind), timeout, f"weights of version {version} ({kind})")
        self.worker.load_weights(manifest, get(refs, timeout, f"weight buckets of version {version} ({kind})"))
        return time.perf_counter() - began

    def generate(self, task: GroupTask) -> tuple[GroupInfo, Array, GroupPayload]:
        """See :meth:`RolloutWorker.generate`; called with ``num_returns=3``, so that the caller owns the arrays."""
        client = None
        if self.prm_servers:
            rewards = self.config.rewards
            client = PrmClient(
                self.prm_servers,
                self.worker.conditioning(task.prompt),
                deadline_s=rewards.deadline_s,
                attempts=rewards.attempts,
                offset=self.index,
            )
        return self.worker.generate(task, client)

    def evaluate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Array:
        """See :meth:`RolloutWorker.evaluate`."""
        return np.asarray(self.worker.evaluate(prompts, seeds))

"""Memory of the processes that train reward models: ranks under ZeRO-3 or one process, and tasks that draw samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from euphonium.config import PrmConfig, RewardOptimizerConfig, TrainingGroupConfig
from orchestrator.plan.memory import TEXT_ENCODERS, Item, RoleMemory, deepspeed_elements, reward_bytes
from orchestrator.plan.meter import Cost
from orchestrator.plan.networks import NetworkPasses, Size
from orchestrator.plan.workload import FLOAT32


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A reward model in training.

    Attributes:
        size: of the model, with what is trained and what ZeRO-3 gathers at a time.
        width: bytes of a number in the type that it computes in; weights are float32.
        pairs: pairs of a micro-batch.
        step: a micro-batch, without copies of weights in that type.
    """

    size: Size
    width: int
    pairs: int
    step: Cost

    @property
    def copies(self) -> float:
        """Bytes of the weights in the type that the model computes in, which autocast keeps for a pass."""
        return self.size.parameters * self.width if self.width < FLOAT32 else 0

    def passes(self) -> tuple[Item, ...]:
        """What a micro-batch holds."""
        return (
            Item(f"micro-batch of {self.pairs} pairs", self.step.peak_bytes, "backward", activations=True),
            Item("weights in the type of the computation", self.copies, "backward"),
        )


def share_of_gpu(learner: TrainingGroupConfig | None) -> float:
    """GPUs of every process: those of a rank, or the one of a process without a group."""
    return 1.0 if learner is None else learner.num_gpus


def training_memory(
    trained: Trained, learner: TrainingGroupConfig | None, settings: RewardOptimizerConfig
) -> RoleMemory:
    """A rank of a learner group, or a process that trains alone; both keep moving averages of float32 weights."""
    weights, states = FLOAT32 * trained.size.parameters, FLOAT32 * trained.size.trained
    if learner is None:
        return RoleMemory(
            (
                Item("float32 weights", weights),
                Item("Adam's moments and moving averages", 3 * states),
                Item("gradients", states, "backward"),
                *trained.passes(),
                Item("gradients and temporaries of the update", 2 * states, "update"),
            ),
            share_of_gpu(learner),
        )
    ranks, away = learner.num_workers, learner.offload_optimizer
    live, bucket, part, _ = deepspeed_elements(learner, settings, torch.float32)
    size, part = trained.size, min(part, trained.size.trained / ranks)
    return RoleMemory(
        (
            Item("share of the weights", weights / ranks),
            Item("float32 weights and Adam's moments", 3 * states / ranks, on_host=away),
            Item("share of the gradients", states / ranks, on_host=away),
            Item("moving averages", states / ranks),
            Item("buffer of reduced gradients", FLOAT32 * bucket),
            Item("whole weights, until they are shared", weights, "start"),
            *trained.passes(),
            Item("gathered weights", FLOAT32 * min(size.parameters, live + size.unit), "backward"),
            Item("gradients of a layer", FLOAT32 * min(size.unit, size.trained), "backward"),
            Item("gradients and temporaries of the update", 3 * FLOAT32 * part, "update", on_host=away),
        ),
        share_of_gpu(learner),
    )


def drawing_memory(passes: NetworkPasses, config: PrmConfig, samples: int) -> RoleMemory:
    """A task that draws samples of the generator, a number of them a pass, and scores them by the outcome rewards."""
    decoding = passes.decode(1)
    return RoleMemory(
        (
            Item("weights", passes.weights.weight_bytes),
            Item("VAE", passes.vae_size.weight_bytes),
            Item("networks of rewards", reward_bytes(config.outcome)),
            Item(f"velocity of {samples}", passes.velocity(samples).peak_bytes, "velocity", activations=True),
            Item("decoding of 1", decoding.peak_bytes, "decoding", activations=True),
            Item("copies in convolutions", decoding.workspace_bytes, "decoding", activations=True),
        ),
        share_of_gpu(config.learner),
    )


def encoding_memory(passes: NetworkPasses, config: PrmConfig) -> RoleMemory:
    """The task that encodes all prompts before anything is drawn."""
    return RoleMemory((Item(TEXT_ENCODERS, passes.encoder_bytes),), share_of_gpu(config.learner))

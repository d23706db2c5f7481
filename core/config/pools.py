"""Sizes of the pools of actors."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from core.config.base import Node, NonNegativeFloat, NonNegativeInt


class PoolConfig(Node):
    """Size of a pool of actors and what each of them takes."""

    num_actors: PositiveInt = 1
    """Actors in the pool."""
    num_cpus: NonNegativeFloat = 1.0
    """CPUs an actor reserves."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs an actor reserves; may be a fraction."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources an actor reserves, for example ``{rollout: 1}``."""
    threads: PositiveInt = 1
    """CPU threads of the actor's tensor operations."""
    max_restarts: NonNegativeInt = 2
    """How often Ray may restart a dead actor."""


class RewardPoolConfig(PoolConfig):
    """Size of a pool of reward servers, and how each of them merges requests."""

    max_batch: PositiveInt = 16
    """Samples in one forward pass: requests that wait together are merged up to it, larger ones are cut."""
    wait_ms: NonNegativeFloat = 2.0
    """How long a server waits for others to share a pass that is not full; it stops waiting while nobody ever comes.
    Requests that arrive while it computes are merged in any case."""


class LearnerPoolConfig(Node):
    """Size of the learner group and what each worker takes."""

    num_workers: PositiveInt = 1
    """ZeRO-3 ranks."""
    num_cpus: NonNegativeFloat = 1.0
    """CPUs a worker reserves."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs a worker reserves (0 or 1)."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources a worker reserves, for example ``{learner: 1}``."""
    threads: PositiveInt = 1
    """CPU threads of a worker's tensor operations."""
    max_failures: NonNegativeInt = 2
    """How often the group may be restarted from the latest checkpoint."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for the group to start."""
    update_timeout_s: PositiveFloat = 1800.0
    """Longest time that the updates of one iteration may take."""
    rows_per_micro_batch: PositiveInt = 16
    """Transitions (sample, step) in one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    persistence_threshold: NonNegativeInt = 10_000
    """ZeRO-3 keeps parameters of fewer elements whole on every rank."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""
    offload_references: bool = False
    """Keep frozen copies of the policy (KL anchor, previous policy) in host memory."""
    weight_bucket_mb: PositiveFloat = 256.0
    """Size of the pieces in which weights are gathered and published."""


class PoolsConfig(Node):
    """The pools; their sizes are independent of each other."""

    rollout: PoolConfig = PoolConfig()
    """Rollout actors, on generator GPUs."""
    prm: RewardPoolConfig = RewardPoolConfig()
    """Process-reward servers, which answer with reward and gradient."""
    orm: RewardPoolConfig = RewardPoolConfig()
    """Outcome-reward servers, which decode latents and score the videos."""
    learner: LearnerPoolConfig = LearnerPoolConfig()
    """The ZeRO-3 learner group."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for all actors to be ready."""
    rejoin_timeout_s: PositiveFloat = 300.0
    """Longest wait for a lost actor to be back; then its pool goes on without it."""

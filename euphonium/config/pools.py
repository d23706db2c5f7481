"""Sizes of the pools of actors and of the learner group, and the resources of their members."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from euphonium.config.base import Node, NonNegativeFloat, NonNegativeInt, PassSize
from euphonium.text_files import quoted

# What Ray accepts as labels of nodes, and as conditions on them.
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_SELECTOR = re.compile(rf"!?({_LABEL.pattern}|in\({_LABEL.pattern}(, ?{_LABEL.pattern})*\))")
LONGEST_PREFIX = 253


def _share(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("Ray gives out parts of one GPU, or several whole ones")
    return gpus


def _more_than_half(gpus: float) -> float:
    if gpus != 0 and not 0.5 < gpus <= 1:
        raise ValueError(
            "a learner takes a GPU (1), none (0), or more than half of one, such as 0.6, and leaves the rest to other "
            "roles: of two halves Ray may put both on one GPU, and NCCL refuses two ranks there"
        )
    return gpus


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name.lower() in ("cpu", "gpu", "memory", "object_store_memory"):
            raise ValueError(f"{quoted(name)} is no custom resource; CPUs and GPUs are num_cpus and num_gpus")
    return resources


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        prefix, separator, last = name.rpartition("/")
        prefixed = len(prefix) <= LONGEST_PREFIX and all(_LABEL_PART.fullmatch(part) for part in prefix.split("."))
        if not _LABEL.fullmatch(last) or (separator and not prefixed):
            raise ValueError(
                f"{quoted(name)} is no name of a label; Ray takes letters, digits, '-', '_' and '.', at most 63, "
                "first and last a letter or digit, behind a prefix such as 'example.org/' if need be"
            )
        if value and not _SELECTOR.fullmatch(value):
            raise ValueError(
                f"{quoted(value)} is no value of the label {quoted(name)}; Ray takes letters, digits, '-', '_' and "
                "'.', at most 63, first and last a letter or digit, or its operators: '!a', 'in(a,b)', '!in(a,b)'"
            )
    return labels


class ShareConfig(Node):
    """Resources of each actor or worker of a pool."""

    num_cpus: NonNegativeFloat = 1.0
    """CPUs that each reserves."""
    num_gpus: Annotated[NonNegativeFloat, AfterValidator(_share)] = 0.0
    """GPUs that each reserves; a fraction for actors that share one."""
    resources: Annotated[dict[str, PositiveFloat], AfterValidator(_custom)] = Field(default_factory=dict)
    """Custom Ray resources that each reserves, for example ``{rollout: 1}``."""
    labels: Annotated[dict[str, str], AfterValidator(_labels)] = Field(default_factory=dict)
    """Labels of the nodes that may run it, for example ``{pool: rollout}``; Ray's operators may be used
    (``{zone: "in(a,b)"}``)."""
    threads: PositiveInt = 1
    """CPU threads of the tensor operations of each."""

    @property
    def reserved(self) -> dict[str, float]:
        """Resources that each member reserves, by Ray's names; zero amounts are left out."""
        each = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in each.items() if amount}

    @property
    def ray_options(self) -> dict[str, Any]:
        """The reservation as options of a Ray actor or task."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": dict(self.resources) or None,
            "label_selector": dict(self.labels) or None,
        }


class _Actors(Node):
    num_actors: PositiveInt = 1
    """Actors in the pool."""


class _Workers(Node):
    num_workers: PositiveInt = 1
    """ZeRO-3 ranks."""


class ActorConfig(ShareConfig):
    """Resources of an actor, and how often it may be restarted."""

    max_restarts: NonNegativeInt = 2
    """How often Ray may restart a dead actor."""


# Fields of the last base come first: the size of a pool, then what each takes.
class PoolConfig(ActorConfig, _Actors):
    """Size of a pool of actors, and the resources of each."""


class RolloutPoolConfig(PoolConfig):
    """Size of the pool of rollout actors, the resources of each, and what it holds on its GPU."""

    sleep: bool = False
    """Keep the policy in pinned host memory while the learner works, and bring it back for the next rollouts: for
    actors that share a GPU with a learner rank on which there is no room for both at work."""
    encode_on_cpu: bool = False
    """Keep the text encoders in host memory and encode prompts there, each once: slow, but it saves their weights on
    the GPU."""


class RewardPoolConfig(PoolConfig):
    """Size of a pool of reward servers, the resources of each, and how it merges requests."""

    max_batch: PassSize = 16
    """Most samples in one forward pass: requests that wait together are merged up to it, larger ones are cut, and a
    pass that does not fit the GPU is halved for good. ``auto`` leaves it to the plan."""
    wait_ms: NonNegativeFloat = 2.0
    """How long a server waits for others to share a pass that is not full; with one client, 0 saves it the wait.
    Requests that arrive while it computes are merged without a wait."""
    merge: bool = True
    """Let requests share passes. The last bits of a number depend on who shares a pass with it, so a run that is to
    repeat to the last bit turns this off."""


class OrmPoolConfig(RewardPoolConfig):
    """Size of the pool of outcome-reward servers, the resources of each, and how it decodes and merges requests."""

    max_batch: PositiveInt = 16
    """Most samples in one pass of the rewards: requests that wait together are merged up to it, larger ones are cut,
    and a pass that does not fit the GPU is halved for good."""
    decode_batch: PassSize = 1
    """Samples that the VAE decodes at a time. Clips of real size take gigabytes each and gain little from company;
    images and tiny clips do. ``auto`` leaves it to the plan."""


class TrainingGroupConfig(ShareConfig, _Workers):
    """Size of a group of ZeRO-3 ranks, and the resources of each."""

    num_gpus: Annotated[float, AfterValidator(_more_than_half)] = 0.0
    """GPUs that each worker reserves: 1, more than half of one to share it with actors of other roles, or 0 to train on
    CPUs."""

    max_failures: NonNegativeInt = 2
    """How often the group may be restarted from the latest checkpoint."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for the group to start."""
    persistence_threshold: NonNegativeInt = 10_000
    """ZeRO-3 keeps parameters of fewer elements whole on every rank."""
    deepspeed: dict[str, bool | int | float] = Field(default_factory=dict)
    """Further fields of DeepSpeed's section ``zero_optimization`` by their own names, such as ``reduce_bucket_size``,
    ``stage3_max_live_parameters`` and ``zero_hpz_partition_size``. Prefetching takes whole blocks by itself."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""


class LearnerPoolConfig(TrainingGroupConfig):
    """Size of the learner group, the resources of each worker, and how they train."""

    update_timeout_s: PositiveFloat = 1800.0
    """Longest time without a sign of life from the group while it carries out an order: it gives one after every
    micro-batch, and after fetching groups, updating, and publishing weights. An update itself may take any time."""
    rows_per_micro_batch: PassSize = 16
    """States in one forward and backward pass, each of a sample at a step; one that all samples of a group share counts
    once. ``auto`` leaves it to the plan."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    shard: Literal["full", "optimizer", "auto"] = "full"
    """What of the policy the ranks share: ``full``, weights, gradients and optimizer states; or ``optimizer``, which
    keeps the weights whole on every rank, also those that adapters leave as they are: they are gathered once an update
    instead of twice a micro-batch, and take their whole size. Frozen copies are shared in any case. ``auto`` leaves it
    to the plan."""
    gather_blocks: bool = True
    """ZeRO-3 gathers a block of the policy as a whole, not layer by layer: less overhead, and the weights and gradients
    of one block at a time on every rank. Adapters and reward models go layer by layer in any case."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share the tokens of every sample (Ulysses), and so its activations: for clips that are too long for
    one GPU. It must divide ``num_workers``, the network's heads and the tokens of a sample; consecutive ranks share, so
    take no more than a node has."""
    offload_references: bool = False
    """Keep frozen copies of the policy (KL anchor, previous policy) in host memory."""
    weight_bucket_mb: PositiveFloat = 256.0
    """Size of the pieces in which weights are gathered and published."""
    weight_transport: Literal["object_store", "collective"] = "object_store"
    """How new weights reach the rollout actors: ``object_store``, where each takes them when it is ready, or
    ``collective``, a broadcast in a group of their own (NCCL between GPUs, gloo between CPUs) for which the learner
    waits until every actor has ended its group; actors that join or fail get them through the object store."""
    weight_broadcast_timeout_s: PositiveFloat = 120.0
    """Longest wait of a broadcast for its members; then the weights go through the object store."""

    @model_validator(mode="after")
    def _every_rank_shares(self) -> Self:
        if self.num_workers % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel: {self.sequence_parallel} ranks share a sample, and num_workers "
                f"({self.num_workers}) is no multiple of it; set num_workers to "
                f"{-(-self.num_workers // self.sequence_parallel) * self.sequence_parallel}"
            )
        return self


class PoolsConfig(Node):
    """All pools; their sizes are independent of each other."""

    rollout: RolloutPoolConfig = RolloutPoolConfig()
    """Rollout actors, on generator GPUs."""
    prm: RewardPoolConfig = RewardPoolConfig()
    """Process-reward servers, which answer with reward and gradient."""
    prm_refresh: ActorConfig | None = None
    """The one actor that trains the process reward model further (``rewards.process.refresh``), where the recipe has it
    do so; None takes what each of the PRM servers takes."""
    orm: OrmPoolConfig = OrmPoolConfig()
    """Outcome-reward servers, which decode latents and score the videos."""
    learner: LearnerPoolConfig = LearnerPoolConfig()
    """The ZeRO-3 learner group."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of each GPU: what is ``auto`` is chosen for it, and ``euphonium validate`` refuses a recipe that does not
    fit; null only warns, of 80."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for all actors to be ready."""
    rejoin_timeout_s: PositiveFloat = 300.0
    """Longest wait for a lost actor to be back; then its pool goes on without it."""

    @model_validator(mode="after")
    def _broadcasts_have_their_gpus(self) -> Self:
        if self.learner.weight_transport == "collective" and (self.rollout.sleep or 0 < self.learner.num_gpus < 1):
            raise ValueError(
                "pools.learner.weight_transport: collective is a group of GPUs that each belong to one member; with "
                "pools.rollout.sleep, or a learner that shares its GPUs, take object_store"
            )
        return self

    @property
    def refresh_pool(self) -> PoolConfig:
        """Settings of the actor that refreshes the process reward model, as a pool of one."""
        share = self.prm if self.prm_refresh is None else self.prm_refresh
        return PoolConfig(num_actors=1, **{name: getattr(share, name) for name in ActorConfig.model_fields})

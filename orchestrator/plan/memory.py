"""Memory of a process of every role, on its GPU and on its host, item by item."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from euphonium.config import OptimizerConfig, OutcomeRewardConfig, RewardOptimizerConfig, TrainingGroupConfig
from orchestrator.plan.hardware import GIB, Hardware
from orchestrator.plan.networks import prompt_bytes
from orchestrator.plan.passes import Passes
from orchestrator.plan.workload import FLOAT32, PassSizes

MEGABYTE = 1 << 20
TEXT_ENCODERS = "text encoders"

# Kernels of convolutions count elements of a tensor in 32 bits, with a sign.
COUNTED = 1 << 31
# DeepSpeed's options in elements, with its defaults: what may be gathered at a time, the buffer in which gradients are
# reduced, and what the optimizer updates at a time.
ELEMENTS = {
    "stage3_max_live_parameters": 1_000_000_000,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
}
# Parameters of the networks of built-in rewards, and bytes each: InternVL3-1B, Qwen2-VL-2B, CLIP ViT-H/14 and ViT-L/14.
REWARD_NETWORKS: dict[str, tuple[float, int]] = {
    "solireward": (0.94e9, 2),
    "videoalign": (2.21e9, 2),
    "hps_v21": (0.986e9, 4),
    "pickscore": (0.986e9, 4),
    "clip_score": (0.986e9, 4),
    "aesthetic": (0.428e9, 4),
}


@dataclass(frozen=True)
class Item:
    """Memory that a process holds.

    Attributes:
        name: what it is.
        nbytes: bytes.
        phase: when it is held; items of different phases are never held together. Empty for always.
        on_host: whether it is in host memory.
        activations: whether it is held while a pass is computed only, and the allocator wastes a share of it.
        sleeps: whether it is in host memory while the learner works, and on the GPU otherwise.
    """

    name: str
    nbytes: float
    phase: str = ""
    on_host: bool = False
    activations: bool = False
    sleeps: bool = False


@dataclass(frozen=True)
class RoleMemory:
    """Memory of one process of a role.

    Attributes:
        items: what it holds.
        gpu_share: GPUs that it reserves: 0 for a process on CPUs.
        largest: elements of the largest tensor that a convolution meets.
    """

    items: tuple[Item, ...]
    gpu_share: float
    largest: float = 0

    def fits(self, hardware: Hardware) -> bool:
        """Whether it fits on its GPU, and convolutions there can count its elements."""
        return self.gpu_gib(hardware) <= hardware.gpu_gib and not (self.gpu_share and self.largest >= COUNTED)

    def gpu_gib(self, hardware: Hardware) -> float:
        """GiB of its GPU while it works, without others that share it (sharing.py); 0 without a GPU."""
        if self.gpu_share == 0:
            return 0.0
        return hardware.reserved_gib + self._peak(hardware, on_host=False)

    def resting_gib(self, hardware: Hardware) -> float:
        """GiB of its GPU while it waits for other roles; 0 without a GPU."""
        if self.gpu_share == 0:
            return 0.0
        kept = [i for i in self.items if not (i.on_host or i.phase or i.activations or i.sleeps)]
        return hardware.reserved_gib + sum(item.nbytes for item in kept) / GIB

    def host_gib(self, hardware: Hardware) -> float:
        """GiB of host memory; without a GPU everything is there."""
        held = self._peak(hardware, on_host=True) + sum(item.nbytes for item in self.items if item.sleeps) / GIB
        if self.gpu_share == 0:
            held += self._peak(hardware, on_host=False)
        return hardware.process_gib + held

    def _peak(self, hardware: Hardware, *, on_host: bool) -> float:
        phases: dict[str, float] = {"": 0.0}
        for item in self.items:
            if item.on_host == on_host:
                size = item.nbytes * (1 + hardware.fragmentation * item.activations)
                phases[item.phase] = phases.get(item.phase, 0.0) + size
        always = phases.pop("")
        return (always + max(phases.values(), default=0.0)) / GIB


def rollout_memory(passes: Passes, sizes: PassSizes) -> RoleMemory:
    """A rollout actor: the policy, text encoders, encoded prompts, and a pass."""
    from euphonium.generators.conditioning import CACHE_BYTES

    config = passes.config
    drawn = config.iterations * config.rollout.prompts_per_iteration + config.evaluation.prompts
    pool = config.pools.rollout
    encodings = min(CACHE_BYTES, -(-drawn // pool.num_actors) * prompt_bytes(passes.generator))
    prepared = config.prompts.embeddings is not None
    encoders = [] if prepared else [Item(TEXT_ENCODERS, passes.encoder_bytes, on_host=pool.encode_on_cpu)]
    items = [
        Item("weights", passes.network_size.weight_bytes, sleeps=pool.sleep),
        *encoders,
        Item("encoded prompts", encodings, on_host=True),
        Item("bucket of new weights", config.pools.learner.weight_bucket_mb * MEGABYTE),
        Item(f"velocity of {sizes.rollout}", passes.velocity(sizes.rollout).peak_bytes, "rollout", activations=True),
        Item(
            f"evaluation of {sizes.evaluation}", passes.velocity(sizes.evaluation).peak_bytes, "evaluation",
            activations=True,
        ),
    ]  # fmt: skip
    # A walk's passes are all remembered until its end; evaluations walk pass by pass.
    for phase, field, size, times in (
        ("rollout", config.rollout.reuse_below, sizes.rollout, config.rollout.group_size / sizes.rollout),
        ("evaluation", config.evaluation.reuse_below, sizes.evaluation, 1),
    ):
        if field is not None:
            items.append(Item(f"outputs for reuse in {phase}", passes.remembered(size).peak_bytes * times, phase))
    if passes.generator.takes_image:
        items.append(Item("VAE", passes.vae_size.weight_bytes, on_host=pool.encode_on_cpu))
    if passes.image_encoder_bytes:
        items.append(Item("image encoder", passes.image_encoder_bytes, on_host=pool.encode_on_cpu))
    return RoleMemory(tuple(items), config.pools.rollout.num_gpus)


def prm_memory(passes: Passes, sizes: PassSizes) -> RoleMemory:
    """A PRM server; a refresh loads the new weights beside the old ones."""
    process, pool = passes.config.rewards.process, passes.config.pools.prm
    refreshed = process is not None and process.refresh is not None
    weights = passes.prm_size.weight_bytes * (2 if refreshed else 1)
    return RoleMemory(
        (
            Item("weights", weights),
            Item(f"score of {sizes.prm}", passes.score(sizes.prm).peak_bytes, "score", activations=True),
            Item(f"gradient of {sizes.prm}", passes.gradient(sizes.prm).peak_bytes, "gradient", activations=True),
        ),
        pool.num_gpus,
    )


def refresh_memory(passes: Passes, sizes: PassSizes) -> RoleMemory:
    """The actor that refreshes the process reward model: two copies of it between refreshes, all of a training in one.

    Samples wait in host memory.
    """
    config, parameters = passes.config, passes.prm_size.parameters
    process = config.rewards.process
    assert process is not None
    assert process.refresh is not None
    step = passes.training_step(saving=process.refresh.gradient_checkpointing)(sizes.refresh)
    weights, width = FLOAT32 * parameters, passes.generator.dtype.itemsize
    held = "moments, gradients, and the weights before"
    group = config.rollout.group_size * passes.latent_bytes + prompt_bytes(passes.generator)
    return RoleMemory(
        (
            Item("float32 weights, and those of the start", 2 * weights),
            Item(held, 4 * weights, "backward"),
            Item(f"micro-batch of {sizes.refresh} pairs", step.peak_bytes, "backward", activations=True),
            Item("weights in the generator's type", parameters * width if width < FLOAT32 else 0, "backward"),
            Item(held, 4 * weights, "update"),
            Item("temporaries of the update", weights, "update"),
            Item("samples", process.refresh.buffer_groups * group, on_host=True),
            Item("published weights", weights, on_host=True),
        ),
        config.pools.refresh_pool.num_gpus,
    )


def orm_memory(passes: Passes, sizes: PassSizes) -> RoleMemory:
    """An ORM server: VAE, rewards and a decoding pass; the rewards' own activations are not counted."""
    decoding = passes.decode(sizes.decode)
    return RoleMemory(
        (
            Item("VAE", passes.vae_size.weight_bytes),
            Item("networks of rewards", reward_bytes(passes.config.rewards.outcome)),
            Item(f"decoding of {sizes.decode}", decoding.peak_bytes, activations=True),
            Item("copies in convolutions", decoding.workspace_bytes, activations=True),
        ),
        passes.config.pools.orm.num_gpus,
        decoding.largest,
    )


def reward_bytes(rewards: list[OutcomeRewardConfig]) -> float:
    """Bytes of the rewards' networks, those that several rewards share once; 0 for rewards of people's own."""
    shared = {(r.type, str(r.options.get("weights")), str(r.options.get("checkpoint"))) for r in rewards}
    sizes = [REWARD_NETWORKS.get(kind, (0.0, 0)) for kind, _, _ in shared]
    return sum(parameters * width for parameters, width in sizes)


def learner_memory(passes: Passes, sizes: PassSizes, ranks: int) -> RoleMemory:
    """A rank of the learner group under ZeRO-3.

    Weights, gradients and optimizer states are shared by all ranks, activations by those that share samples. In the
    backward pass there are, besides the activations, the weights that are gathered, gradients of one block, and the
    buffer in which they are reduced; in the update, float32 gradients and temporary tensors of what is updated.
    """
    size, pool, width = passes.network_size, passes.config.pools.learner, passes.generator.dtype.itemsize
    trained, whole = size.trained / ranks, size.kept_whole(whole_weights=sizes.whole_weights)
    live, bucket, part, accumulated = deepspeed_elements(pool, passes.config.optimizer, passes.generator.dtype)
    part = min(part, trained)
    copies = frozen_copies(passes)
    items = [
        Item("share of the weights", size.weight_bytes / ranks),
        Item("whole weights" if sizes.whole_weights else "whole small weights", whole * width),
        Item("float32 weights and Adam's moments", 12 * trained, on_host=pool.offload_optimizer),
        Item("share of the gradients", accumulated * trained, on_host=pool.offload_optimizer),
        Item("buffer of reduced gradients", bucket * width),
        Item("float32 copy of it", FLOAT32 * bucket if sizes.sharing > 1 and width < FLOAT32 else 0, "backward"),
        Item(
            f"micro-batch of {sizes.learner}", passes.micro_step(sizes.learner).peak_bytes / sizes.sharing, "backward",
            activations=True,
        ),
        Item("gathered weights", min(size.parameters - whole, live + size.unit) * width, "backward"),
        Item("gradients of a block", min(size.unit, size.trained) * width, "backward"),
        Item("gradients and temporaries of the update", 3 * FLOAT32 * part, "update", on_host=pool.offload_optimizer),
        Item("process and checkpoint copies", 12 * trained, on_host=True),
    ]  # fmt: skip
    if copies:
        shared = copies * size.weight_bytes / ranks
        items.append(Item("frozen copies of the policy", shared, on_host=pool.offload_references))
    if passes.config.optimizer.averages:
        items.append(Item("moving averages", FLOAT32 * trained))
    return RoleMemory(tuple(items), pool.num_gpus)


def deepspeed_elements(
    pool: TrainingGroupConfig, settings: OptimizerConfig | RewardOptimizerConfig, dtype: torch.dtype
) -> tuple[float, float, float, int]:
    """A learner's :data:`ELEMENTS` in their order, and bytes of a number of the accumulated gradients."""
    from learners.engine.options import training_options

    options = training_options(pool, settings, dtype, whole_below=0)
    zero, types = (options.get(name) for name in ("zero_optimization", "data_types"))
    set_here = zero if isinstance(zero, dict) else {}
    live, bucket, part = (float(set_here.get(name, default)) for name, default in ELEMENTS.items())
    single = isinstance(types, dict) and types.get("grad_accum_dtype") == "fp32"
    return live, bucket, part, FLOAT32 if single else dtype.itemsize


def frozen_copies(passes: Passes) -> int:
    """Further transformers of a learner rank; with adapters there are none."""
    objective = passes.config.objective
    if passes.config.model.lora is not None:
        return 0
    return (objective.kl is not None and objective.kl.anchor != "none") + objective.needs_previous_policy


def publication_bytes(passes: Passes) -> int:
    """Bytes of the weights that are published after an iteration."""
    return passes.network_size.trained * passes.generator.dtype.itemsize


def computes_in(passes: Passes, role: str) -> torch.dtype:
    """The type that a role computes in."""
    return passes.vae.dtype if role == "orm" else passes.generator.dtype

"""What the plan chooses where a recipe of ``train-prm`` says ``auto``: samples of a pass of the generator."""

from __future__ import annotations

from euphonium.config import PairsConfig, PrmConfig
from euphonium.errors import ConfigError
from orchestrator.plan.choice import AUTO, FILLED, LONG_ENOUGH_S, Value, evenly, settled, smallest_that
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.networks import NetworkPasses
from orchestrator.plan.reward_memory import drawing_memory, share_of_gpu

FIELD = "pairs.samples_per_pass"


def choose_drawn(config: PrmConfig, gpu_gib: float | None) -> PrmConfig:
    """The recipe with numbers for all of its ``auto``, as :func:`orchestrator.plan.choice.choose` has it.

    Args:
        config: the recipe.
        gpu_gib: memory of a GPU; None if it is not known.
    """
    if config.pairs.samples_per_pass != AUTO:
        return config
    value, why = _chosen(config, gpu_gib)
    return settled(config, {FIELD: (value, why)})


def _chosen(config: PrmConfig, gpu_gib: float | None) -> tuple[Value, str]:
    default: int = PairsConfig.model_fields["samples_per_pass"].default
    if config.preferences is not None:
        return default, "the default, as nothing is drawn"
    if not share_of_gpu(config.learner):
        return default, "the default, for CPUs"
    if gpu_gib is None:
        return 1, "the smallest, as gpu_memory_gib does not say what a GPU has"
    try:
        passes = NetworkPasses(config.model, config.blocks)
    except ConfigError as error:
        return 1, f"the smallest, as there is no plan ({error})"
    passes.velocity = evenly(passes.velocity)
    hardware, room = Hardware(gpu_gib=gpu_gib), Hardware(gpu_gib=FILLED * gpu_gib)
    samples = smallest_that(
        lambda n: hardware.seconds(passes.velocity(n), passes.generator.dtype) >= LONG_ENOUGH_S["rollout"], default
    )
    while samples > 1 and not drawing_memory(passes, config, samples).fits(room):
        samples -= 1
    return samples, f"{drawing_memory(passes, config, samples).gpu_gib(hardware):.1f} GiB of {gpu_gib:g}"

"""Sequence parallelism: several ranks share the tokens of every sample.

diffusers' context parallelism does it by a plan (:meth:`Backbone.context_parallel_plan`): tokens are split before the
first block, exchanged for heads in every attention (Ulysses), and gathered after the last layer. Every rank then has
the whole output. In the backward pass each goes on with its own tokens alone, so that the sum of the ranks' gradients
is the gradient.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

from torch import nn

from euphonium.errors import ConfigError
from euphonium.generators.generator import Generator

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig

FIELD = "pools.learner.sequence_parallel"


def check_sequence_parallel(generator: Generator, ranks: int) -> None:
    """Checks that ranks can share the samples of a generator; reads its configuration alone.

    Args:
        generator: the generator.
        ranks: how many share a sample.

    Raises:
        ConfigError: they cannot; names the numbers of ranks that can.
    """
    if ranks == 1:
        return
    if generator.context_parallel_plan() is None:
        raise ConfigError(f"{FIELD}: {ranks}: the tokens of a {generator.pipeline_class} cannot be shared; set it to 1")
    able = ranks_that_share(generator)
    if ranks not in able:
        held = " and ".join(f"{count} {what}" for what, count in _shared(generator).items())
        remedy = f"{', '.join(map(str, able))} can" if able else "no number can: set it to 1, or change their size"
        raise ConfigError(f"{FIELD}: {ranks} ranks cannot share {held} evenly; {remedy}")
    if not generator.exchanges_tokens:
        _check_backend(generator.config.attention_backend)


def ranks_that_share(generator: Generator) -> list[int]:
    """Numbers of ranks above 1 that can share a sample evenly; none for networks whose tokens cannot be shared."""
    if generator.context_parallel_plan() is None:
        return []
    common = gcd(*_shared(generator).values())
    return [number for number in range(2, common + 1) if common % number == 0]


def _shared(generator: Generator) -> dict[str, int]:
    return {"heads": int(generator.transformer_config()["num_attention_heads"])} | generator.shared_tokens()


def _check_backend(name: str | None) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backend = _AttentionBackendRegistry.get_active_backend()[0] if name is None else AttentionBackendName(name)
    if not _AttentionBackendRegistry._is_context_parallel_available(backend):
        able = sorted(map(str, _AttentionBackendRegistry._supports_context_parallel))
        raise ConfigError(
            f"model.attention_backend: {backend.value} computes no attention of shared tokens ({FIELD}); take one of "
            f"{', '.join(able)}"
        )


def share_tokens(transformer: nn.Module, generator: Generator, config: ParallelConfig) -> None:
    """Makes a transformer share the tokens of its samples with other ranks, which must make every pass together.

    ``enable_parallelism`` of diffusers does the same, but fails on machines without an accelerator.

    Args:
        transformer: the transformer, with its adapters.
        generator: its generator, which :func:`check_sequence_parallel` lets pass.
        config: the groups of ranks.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel

    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(transformer, config.context_parallel_config, generator.context_parallel_plan())

"""Passes that reuse what the last one computed behind its first block, where no likelihood depends on the result.

Between two steps of a sampler the blocks of a transformer often add nearly the same to what the first of them added.
The first-block cache of diffusers notices that by the first block alone, and adds what they added before. A step that
may be trained must never do so: the learner computes it in full, and both would disagree on its probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from euphonium.errors import ConfigError
from euphonium.generators.generator import Generator

# Below every difference: all blocks are computed.
NEVER = -1.0


def check_feature_cache(generator: Generator, fields: Sequence[str]) -> None:
    """Checks that passes of a generator can be reused; builds its network on the meta device.

    Args:
        generator: the generator.
        fields: the recipe's fields that want it.

    Raises:
        ConfigError: diffusers has no first-block cache for its network.
    """
    if not fields:
        return
    with torch.device("meta"):
        network = generator.build_transformer()
    try:
        FeatureCache(network)
    except ConfigError as error:
        raise ConfigError(f"{' and '.join(fields)}: {error}") from error


class FeatureCache:
    """The first-block cache of a transformer, or of each of them where a policy has several.

    A pass through the transformer is exact, costs nothing more and leaves nothing behind, unless it is one of
    :meth:`compute`.

    Attributes:
        networks: the networks, each of which remembers its own passes.
        passes: those of :meth:`compute` so far.
        reused: how many of them reused what the blocks had added.
    """

    def __init__(self, transformer: nn.Module) -> None:
        """Hooks the cache into the transformer's blocks.

        Raises:
            ConfigError: diffusers has no such cache for this network.
        """
        from diffusers import FirstBlockCacheConfig, Flux2Transformer2DModel
        from diffusers.hooks._helpers import TransformerBlockRegistry
        from diffusers.hooks.first_block_cache import FBCBlockHook, FBCHeadBlockHook
        from diffusers.models.cache_utils import CacheMixin
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformerBlock
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock

        self.passes = self.reused = 0
        self.networks: list[Any] = [part for part in transformer.modules() if isinstance(part, CacheMixin)]
        if not self.networks:
            raise ConfigError(_unsupported(f"{type(transformer).__name__} has none"))
        if isinstance(transformer, Flux2Transformer2DModel):
            raise ConfigError(_unsupported("it fails between the two kinds of blocks of FLUX.2"))
        # diffusers 0.42 lacks what these blocks return, which is what those of HunyuanVideo do.
        TransformerBlockRegistry.register(
            HunyuanVideo15TransformerBlock, TransformerBlockRegistry.get(HunyuanVideoTransformerBlock)
        )
        for network in self.networks:
            try:
                network.enable_cache(FirstBlockCacheConfig(threshold=NEVER))
            except ValueError as error:
                raise ConfigError(_unsupported(str(error))) from error
        registries: list[Any] = [getattr(part, "_diffusers_hook", None) for part in transformer.modules()]
        hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
        self._heads: list[Any] = [hook for hook in hooks if isinstance(hook, FBCHeadBlockHook)]
        blocks: list[Any] = [hook for hook in hooks if isinstance(hook, (FBCHeadBlockHook, FBCBlockHook))]
        # What a block computes with its hook and without.
        self._ways = [(hook.fn_ref, hook.fn_ref.forward, hook.fn_ref.original_forward) for hook in blocks]
        self._bypass()

    def forget(self) -> None:
        """Forgets all passes, before samples that have nothing to do with the last ones."""
        for network in self.networks:
            network._reset_stateful_cache()

    @property
    def held_bytes(self) -> int:
        """Bytes of what is held of all passes."""
        states = [vars(state) for head in self._heads for state in head.state_manager._state_cache.values()]
        tensors = {id(leaf): leaf for leaf in tree_leaves(states) if isinstance(leaf, Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def compute(self, name: str, size: int, threshold: float, one_pass: Callable[[], Tensor]) -> Tensor:
        """A pass over the samples called ``name``, which may reuse what their last pass computed.

        Args:
            name: of the samples that pass together.
            size: their number; where it has changed, all is computed.
            threshold: relative change of what the first block adds, up to which the others are not computed;
                :data:`NEVER` for a pass that must be exact, and is remembered.
            one_pass: the pass.
        """
        with ExitStack() as stack:
            stack.enter_context(self._hooked())
            for network in self.networks:
                stack.enter_context(network.cache_context(f"{name}, {size} of them"))
            for head in self._heads:
                head.threshold = threshold
                state = head.state_manager.get_state()
                # Where a pass goes through one of two transformers, the other one reuses nothing.
                state.should_compute = True
                if threshold == NEVER:
                    # There is nothing to compare with, which would have the device waited for.
                    state.head_block_residual = None
            output = one_pass()
            self.passes += 1
            self.reused += any(not head.state_manager.get_state().should_compute for head in self._heads)
        return output

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        for block, hooked, _ in self._ways:
            block.forward = hooked
        try:
            yield
        finally:
            self._bypass()

    def _bypass(self) -> None:
        for block, _, plain in self._ways:
            block.forward = plain


def _unsupported(reason: str) -> str:
    return f"diffusers has no first-block cache for this network ({reason}); leave reuse_below out"

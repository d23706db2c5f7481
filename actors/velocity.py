"""The network's output as the sampler sees it: a function of state and time, computed in passes that fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from actors.sampler import Velocity
from euphonium.generators.conditioning import Conditioning, expand
from euphonium.generators.feature_cache import NEVER, FeatureCache
from euphonium.generators.generator import Generator
from euphonium.wire.passes import Passes


class Reuse:
    """Which passes of a group's walk may reuse what the last one computed."""

    def __init__(self, cache: FeatureCache, threshold: float, exact_times: frozenset[float] = frozenset()) -> None:
        """Begins with no pass.

        Args:
            cache: the transformer's cache.
            threshold: as for :meth:`FeatureCache.compute`.
            exact_times: times of the steps that must be exact: those with noise, which may be trained.
        """
        self._cache = cache
        self._threshold = threshold
        self._exact_times = exact_times
        self._before = cache.passes, cache.reused

    @property
    def share(self) -> float:
        """Of the passes so far, how many reused something."""
        counts = self._cache.passes, self._cache.reused
        passes, reused = (now - then for now, then in zip(counts, self._before, strict=True))
        return reused / passes if passes else 0.0

    def compute(self, part: slice, time: float, one_pass: Callable[[], Tensor]) -> Tensor:
        """A pass over a part of the samples at a time of the sampler."""
        threshold = NEVER if time in self._exact_times else self._threshold
        return self._cache.compute(f"from {part.start}", part.stop - part.start, threshold, one_pass)


def velocity_in_passes(
    family: Generator, transformer: nn.Module, conditioning: Conditioning, passes: Passes, reuse: Reuse | None = None
) -> Velocity:
    """A transformer's output as a function of state and time, without gradients, in passes that fit.

    Args:
        family: the generator.
        transformer: its transformer.
        conditioning: conditioning of one prompt, or of one a sample.
        passes: passes over the samples.
        reuse: which passes may reuse what the last one computed; None for exact ones.
    """

    @torch.no_grad()
    def velocity(x: Tensor, time: float) -> Tensor:
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        prompt = expand(conditioning, len(x))

        def one_pass(part: slice) -> Tensor:
            read = {name: tensor[part] for name, tensor in prompt.items()}

            def computed() -> Tensor:
                return family.velocity(transformer, x[part], times[part], read)

            return computed() if reuse is None else reuse.compute(part, time, computed)

        return torch.cat(passes.run(len(x), one_pass))

    return velocity

"""The first-block cache: exact where it must be, and refused where a network has none."""

import pytest
import torch
from torch import Tensor, nn

from actors.sampler import Velocity
from actors.velocity import Reuse, velocity_in_passes
from euphonium.errors import ConfigError
from euphonium.generators.feature_cache import FeatureCache, check_feature_cache
from euphonium.generators.generator import Generator
from euphonium.wire.passes import Passes
from tests.euphonium.generators.cases import CPU, PROMPTS, conditioning_of, family_of, noise, one_a_family
from tests.euphonium.generators.tiny_pipelines import Folders

WITHOUT = ("ltx2", "ltx2.3", "z-image", "sd3", "sd1", "flux2 dev", "flux2 klein", "minimax h3")
# Where a policy has two transformers, one computes all of them.
TIMES = (0.6, 0.55, 0.5)
ALWAYS = 1e9


def walked(family: Generator, transformer: nn.Module, reuse: Reuse | None, size: int = len(PROMPTS)) -> list[Tensor]:
    """Outputs at some times of a walk, in passes of a size."""
    velocity = walked_by(family, transformer, reuse, size)
    x = noise(family)
    return [velocity(x * time, time) for time in TIMES]


def walked_by(family: Generator, transformer: nn.Module, reuse: Reuse | None, size: int = len(PROMPTS)) -> Velocity:
    return velocity_in_passes(family, transformer, conditioning_of(family), Passes(size, "size"), reuse)


@one_a_family
def test_passes_are_reused_only_where_they_may_be(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    if name in WITHOUT:
        with pytest.raises(ConfigError, match=r"no first-block cache for this network.*leave reuse_below out"):
            FeatureCache(transformer)
        with pytest.raises(ConfigError, match=r"^rollout\.reuse_below: diffusers has no"):
            check_feature_cache(family, ["rollout.reuse_below"])
        check_feature_cache(family, [])
        return
    exact = walked(family, transformer, None)
    check_feature_cache(family, ["rollout.reuse_below"])
    cache = FeatureCache(transformer)
    some = Reuse(cache, ALWAYS, frozenset({TIMES[2]}))
    first, second, third = walked(family, transformer, some)
    assert torch.equal(first, exact[0]), "there is nothing to reuse yet"
    assert not torch.equal(second, exact[1])
    assert torch.equal(third, exact[2]), "a step that may be trained"
    assert some.share == pytest.approx(1 / 3)


def test_exact_passes_know_nothing_of_the_cache(folders: Folders) -> None:
    family = family_of("wan a14b", folders)
    transformer = family.load_transformer(CPU)
    exact = walked(family, transformer, None)
    cache = FeatureCache(transformer)
    # The hooks of diffusers refuse every pass that is not one of the cache.
    assert torch.equal(torch.stack(walked(family, transformer, None)), torch.stack(exact))
    velocity = walked_by(family, transformer, reuse := Reuse(cache, ALWAYS))
    velocity(noise(family), 0.6)
    walked(family, transformer, None)
    velocity(noise(family), 0.55)
    assert (cache.passes, cache.reused, reuse.share) == (2, 1, 0.5), "between two steps of a walk neither"
    assert cache.held_bytes > 0
    cache.forget()
    assert cache.held_bytes == 0


def test_every_pass_remembers_its_own_samples(folders: Folders) -> None:
    family = family_of("wan", folders)
    transformer = family.load_transformer(CPU)
    cache = FeatureCache(transformer)
    together = walked(family, transformer, Reuse(cache, ALWAYS))
    cache.forget()
    alone = walked(family, transformer, Reuse(cache, ALWAYS), size=1)
    torch.testing.assert_close(torch.stack(alone), torch.stack(together), atol=1e-5, rtol=1e-4)


def test_a_pass_of_another_size_is_computed(folders: Folders) -> None:
    family = family_of("wan", folders)
    transformer = family.load_transformer(CPU)
    cache = FeatureCache(transformer)
    reuse = Reuse(cache, ALWAYS)
    velocity = velocity_in_passes(family, transformer, conditioning_of(family, PROMPTS[:1]), Passes(4, "size"), reuse)
    x = noise(family)
    velocity(x[:1], 0.9)
    velocity(x, 0.8)
    assert reuse.share == 0
    velocity(x, 0.7)
    assert reuse.share == pytest.approx(1 / 3)

"""The first-block cache: exact where it must be, and refused where a network has none."""

import pytest
import torch
from torch import Tensor, nn

from actors.velocity import Reuse, velocity_in_passes
from euphonium.errors import ConfigError
from euphonium.generators.feature_cache import FeatureCache
from euphonium.generators.generator import Generator
from euphonium.wire.passes import Passes
from tests.euphonium.generators.cases import CPU, PROMPTS, conditioning_of, family_of, noise, one_a_family
from tests.euphonium.generators.tiny_pipelines import Folders

WITHOUT = ("z-image", "sd3", "sd1", "flux2 dev", "flux2 klein")
# Where a policy has two transformers, one computes all of them.
TIMES = (0.6, 0.55, 0.5)
ALWAYS = 1e9


def walked(family: Generator, transformer: nn.Module, reuse: Reuse | None, size: int = len(PROMPTS)) -> list[Tensor]:
    """Outputs at some times of a walk, in passes of a size."""
    velocity = velocity_in_passes(family, transformer, conditioning_of(family), Passes(size, "size"), reuse)
    x = noise(family)
    return [velocity(x * time, time) for time in TIMES]


@one_a_family
def test_passes_are_reused_only_where_they_may_be(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    exact = walked(family, family.load_transformer(CPU), None)
    transformer = family.load_transformer(CPU)
    if name in WITHOUT:
        with pytest.raises(ConfigError, match=r"reuse_below.*leave them out"):
            FeatureCache(transformer)
        return
    cache = FeatureCache(transformer)
    assert torch.equal(torch.stack(walked(family, transformer, Reuse(cache))), torch.stack(exact))
    cache.forget()
    some = Reuse(cache, ALWAYS, frozenset({TIMES[2]}))
    first, second, third = walked(family, transformer, some)
    assert torch.equal(first, exact[0]), "there is nothing to reuse yet"
    assert not torch.equal(second, exact[1])
    assert torch.equal(third, exact[2]), "a step that may be trained"
    assert some.share == pytest.approx(1 / 3)


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

"""VAEs: the scale of every family's latents, the same on the way in and on the way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from euphonium.generators.encoding import load_encoder
from euphonium.generators.ltx2 import Ltx2
from tests.euphonium.generators.cases import CASES, CPU, TRANSFORMERS, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders


def by_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


# The sampler's latents of the network's, by the numbers of each tiny pipeline.
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "flux": lambda z: (z - 0.1159) * 0.3611,
    "z-image": lambda z: (z - 0.1159) * 0.3611,
    **dict.fromkeys(
        ("flux2 dev", "flux2 klein"),
        lambda z: (
            (z - by_channel(torch.linspace(-0.5, 0.5, 16).tolist()))
            / (by_channel(torch.linspace(0.5, 2, 16).tolist()) + 1e-4).sqrt()
        ),
    ),
    "sd3": lambda z: (z - 0.0609) * 1.5305,
    "sd1": lambda z: z * 0.18215,
    **dict.fromkeys(
        ("qwen", "qwen edit", "qwen edit plus", "wan", "wan 2.2", "wan i2v", "wan 2.2 i2v", "wan a14b", "wan a14b i2v"),
        lambda z: (z - by_channel([-0.7, 0.1, 0.3, -0.2])) / by_channel([2.8, 1.4, 2.3, 0.9]),
    ),
    **dict.fromkeys(
        ("ltx", "ltx 0.9.1", "ltx2", "ltx2.3"),
        lambda z: (z - by_channel([-0.7, 0.1, 0.3, -0.2])) * 1.5 / by_channel([2.8, 1.4, 2.3, 0.9]),
    ),
    "hunyuan": lambda z: z * 0.476986,
    **dict.fromkeys(("hunyuan 1.5", "hunyuan 1.5 i2v"), lambda z: z * 1.03682),
    "skyreels": lambda z: z * 0.476986,
}


# States of MiniMax-H3 hold more than what its VAE encodes.
one_a_vae = pytest.mark.parametrize("name", [name for name in (*TRANSFORMERS, "sd1") if name != "minimax h3"])


def clips(name: str, count: int) -> Tensor:
    frames, height, width = CASES[name].size
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


@one_a_vae
def test_latents_are_scaled_by_the_pipelines_numbers_both_ways(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    vae, z = family.load_vae(CPU, torch.float32), noise(family)
    torch.testing.assert_close(vae.scaled(z), SCALES[name](z))
    torch.testing.assert_close(vae.unscaled(vae.scaled(z)), z)


@one_a_vae
def test_encoded_videos_are_the_networks_mode_scaled(name: str, folders: Folders) -> None:
    family, videos = family_of(name, folders), clips(name, 1)
    vae = family.load_vae(CPU, torch.float32)
    pixels = videos.transpose(1, 2) * 2 - 1
    if family.config.frames == 1 and not name.startswith("qwen"):
        pixels = pixels.squeeze(2)
    with torch.no_grad():
        mode = vae.network.encode(pixels).latent_dist.mode()
    if name.startswith("flux2"):
        mode = Flux2KleinPipeline._patchify_latents(mode)
    latents = vae.encode(videos)
    assert latents.shape[1:] == family.latent_shape
    if isinstance(family, Ltx2):
        latents, sound = family.layout.split(latents)
        assert sound.numel() > 0
        assert not sound.any()
    torch.testing.assert_close(latents, SCALES[name](mode.view(latents.shape)))


@pytest.mark.parametrize("name", ["sd3", "wan", "wan 2.2", "hunyuan", "hunyuan 1.5"])
def test_videos_in_a_batch_are_encoded_as_alone(name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights decode to nothing like what they encoded.
    monkeypatch.setattr("euphonium.generators.encoding._check_decodes", lambda *_: None)
    encode, videos = load_encoder(family_of(name, folders), CPU), clips(name, 2)
    together = encode(videos)
    torch.testing.assert_close(together[1:], encode(videos[1:]), atol=1e-5, rtol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 1e-3

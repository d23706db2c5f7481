"""Videos to latents: the VAE's way in, for reward models that are trained on videos from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from euphonium.errors import ConfigError
from euphonium.generators.generator import GeneratorFamily

# Videos ``[batch, frames, 3, height, width]`` in [0, 1] to latents ``[batch, *latent_shape]``, float32.
VideoEncoder = Callable[[Tensor], Tensor]


def load_encoder(family: GeneratorFamily, device: torch.device) -> VideoEncoder:
    """The inverse of the family's decoder: latents as its sampler ends with them, at the VAE's mode.

    Videos are scaled to the size of the family's samples; of longer ones the first frames are taken.

    Args:
        family: of the generator.
        device: to encode on.

    Raises:
        ConfigError: later, when a video is encoded: too few frames, or latents that do not decode to it again.
    """
    import diffusers

    config: dict[str, Any] = json.loads((family.folder / "vae" / "config.json").read_text())
    vae_class = getattr(diffusers, config["_class_name"])
    vae = vae_class.from_pretrained(family.folder / "vae", torch_dtype=torch.float32).to(device).eval()
    decode = family.load_decoder(device)
    shape = (family.config.frames, family.config.height, family.config.width)
    checked = False

    @torch.no_grad()
    def encode(videos: Tensor) -> Tensor:
        nonlocal checked
        videos = fitted(videos, *shape).to(device)
        latents = _normalised(_encoded(vae, videos), vae)
        if latents.shape[1:] != family.latent_shape:
            raise ConfigError(
                f"the VAE of {family.folder} makes latents {tuple(latents.shape[1:])} of videos {shape}; the generator "
                f"expects {family.latent_shape}: check model.frames, model.height and model.width"
            )
        if not checked:
            _check_decodes(videos[:1], decode(latents[:1]).to(device), family)
            checked = True
        return latents.float().cpu()

    return encode


def fitted(videos: Tensor, frames: int, height: int, width: int) -> Tensor:
    """The first frames of videos ``[batch, frames, 3, height, width]``, resized where they have another size.

    Raises:
        ConfigError: too few frames.
    """
    if videos.shape[1] < frames:
        raise ConfigError(f"a video of {videos.shape[1]} frames; the recipe's model.frames is {frames}")
    videos = videos[:, :frames]
    if videos.shape[3:] == (height, width):
        return videos
    flat = functional.interpolate(videos.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    return flat.clamp(0, 1).unflatten(0, videos.shape[:2])


def _encoded(vae: Any, videos: Tensor) -> Tensor:
    pixels = videos.transpose(1, 2) * 2 - 1
    flat = type(vae).__name__ == "AutoencoderKL"
    output = vae.encode(pixels.squeeze(2) if flat else pixels)
    latents: Tensor = output.latent_dist.mode()
    return latents.unsqueeze(2) if flat else latents


def _normalised(latents: Tensor, vae: Any) -> Tensor:
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def _check_decodes(video: Tensor, again: Tensor, family: GeneratorFamily) -> None:
    """Latents in another scale than the decoder's would train a model of another space, without a sign."""
    error = float((again - video).square().mean())
    spread = float(video.var())
    if error > spread + 0.01:
        raise ConfigError(
            f"a video that the VAE of {family.folder} encoded does not come back from its decoder (squared error "
            f"{error:.3f}, variance of the video {spread:.3f}): encode it with the generator's own pipeline, and give "
            "latents (.safetensors, .npy) instead"
        )

"""Encodes videos to latents with the generator's VAE, for reward models that are trained on video files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from euphonium.errors import ConfigError
from euphonium.generators.generator import Generator

# Videos ``[batch, frames, 3, height, width]`` in [0, 1] to latents ``[batch, *latent_shape]``, float32.
VideoEncoder = Callable[[Tensor], Tensor]


def load_encoder(generator: Generator, device: torch.device) -> VideoEncoder:
    """The inverse of the generator's decoder: latents in the scale of finished samples, at the mode of the VAE.

    Videos are resized to the generator's size; of longer ones the first frames are taken.

    Args:
        generator: the generator whose VAE is used.
        device: device to encode on.

    Returns:
        A function that raises ConfigError if a video has too few frames, or its latents do not decode to it again.
    """
    vae = generator.load_vae(device, torch.float32)
    decode = generator.load_decoder(device)
    shape = (generator.config.frames, generator.config.height, generator.config.width)
    checked = False

    def encode(videos: Tensor) -> Tensor:
        nonlocal checked
        videos = fitted(videos, *shape).to(device)
        latents = vae.encode(videos)
        if latents.shape[1:] != generator.latent_shape:
            raise ConfigError(
                f"the VAE of {generator.folder} makes latents {tuple(latents.shape[1:])} of videos {shape}; the "
                f"generator expects {generator.latent_shape}: check model.frames, model.height and model.width"
            )
        if not checked:
            _check_decodes(videos[:1], decode(latents[:1]).to(device), generator)
            checked = True
        return latents.float().cpu()

    return encode


def fitted(videos: Tensor, frames: int, height: int, width: int) -> Tensor:
    """The first frames of videos ``[batch, any, 3, any, any]``, resized if their size differs.

    Raises:
        ConfigError: a video has too few frames.
    """
    if videos.shape[1] < frames:
        raise ConfigError(f"a video of {videos.shape[1]} frames; the recipe's model.frames is {frames}")
    videos = videos[:, :frames]
    if videos.shape[3:] == (height, width):
        return videos
    flat = functional.interpolate(videos.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    return flat.clamp(0, 1).unflatten(0, videos.shape[:2])


def _check_decodes(video: Tensor, again: Tensor, generator: Generator) -> None:
    """Raises if a video does not come back: latents in another scale would silently train a useless model."""
    error = float((again - video).square().mean())
    spread = float(video.var())
    if error > spread + 0.01:
        raise ConfigError(
            f"a video that the VAE of {generator.folder} encoded does not come back from its decoder (squared error "
            f"{error:.3f}, variance of the video {spread:.3f}): encode it with the generator's own pipeline, and give "
            "latents (.safetensors, .npy) instead"
        )

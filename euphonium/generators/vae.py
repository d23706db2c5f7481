"""Diffusers VAEs with common conventions: pixels in [0, 1], and latents in the scale of the generator's samples.

The scale between those latents and the network's own is defined here, once for encoding and decoding; a family with
another one overrides it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.errors import ConfigError

# A VAE of diffusers or its class: they share ``encode``, ``decode`` and ``config``, but no type.
Autoencoder = Any


class VideoVae:
    """The VAE of a video generator.

    Its latents are ``(z - shift_factor) scaling_factor`` of the network's ``z``; a missing shift is 0.

    Attributes:
        network: the diffusers VAE.
        device: device that it is on.
        dtype: type that it computes in.
    """

    def __init__(self, network: Autoencoder, device: torch.device, dtype: torch.dtype) -> None:
        self.network = network
        self.device = device
        self.dtype = dtype

    @classmethod
    def load(cls, kind: Autoencoder, folder: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """Loads a VAE of diffusers' class ``kind`` from a pipeline's folder; on the meta device without weights."""
        if device.type == "meta":
            with device:
                network = kind.from_config(kind.load_config(folder / "vae"))
            return cls(nn.Module.to(network, dtype=dtype).eval(), device, dtype)
        return cls(kind.from_pretrained(folder / "vae", dtype=dtype).to(device).eval(), device, dtype)

    def saving_memory(self, *, tiling: bool, slicing: bool) -> Self:
        """Enables the memory savers of ``model.vae_tiling`` and ``model.vae_slicing``.

        Raises:
            ConfigError: this VAE does not support one of them.
        """
        for option, wanted in (("tiling", tiling), ("slicing", slicing)):
            if wanted:
                enable = getattr(self.network, f"enable_{option}", None)
                if enable is None:
                    raise ConfigError(f"model.vae_{option}: {type(self.network).__name__} cannot do that; leave it off")
                enable()
        return self

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Encodes videos to latents ``[batch, channels, frames, rows, columns]``, the mode of the VAE's distribution.

        Args:
            videos: ``[batch, frames, 3, height, width]`` in [0, 1].
        """
        pixels = (videos * 2 - 1).transpose(1, 2).to(device=self.device, dtype=self.dtype)
        return self.scaled(self._encode(pixels))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents of :meth:`encode` to videos ``[batch, frames, 3, height, width]``, float32 in [0, 1]."""
        pixels = self._decode(self.unscaled(latents.to(device=self.device, dtype=self.dtype)))
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents in the sampler's scale, given latents in the network's."""
        shift, factor = self._scale()
        return (latents - shift) * factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the network's scale, given latents in the sampler's."""
        shift, factor = self._scale()
        return latents / factor + shift

    def _scale(self) -> tuple[float, float]:
        config = self.network.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def _encode(self, pixels: Tensor) -> Tensor:
        """Latents in the network's scale of pixels ``[batch, 3, frames, height, width]`` in [-1, 1]."""
        latents: Tensor = self.network.encode(pixels).latent_dist.mode()
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`_encode`."""
        pixels: Tensor = self.network.decode(latents, return_dict=False)[0]
        return pixels


class ImageVae(VideoVae):
    """The VAE of an image generator: its network has no frame dimension, its videos have one frame."""

    @override
    def _encode(self, pixels: Tensor) -> Tensor:
        return super()._encode(pixels.squeeze(2)).unsqueeze(2)

    @override
    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents.squeeze(2)).unsqueeze(2)

"""The base of image generators: latents of one frame, and diffusers' ``AutoencoderKL``."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from euphonium.generators.generator import Generator
from euphonium.generators.vae import Autoencoder, ImageVae, VideoVae


class ImageGenerator(Generator):
    """Base of generators whose latents have no frame dimension in diffusers; here they have one of size 1."""

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.pipeline.component_config("vae")["latent_channels"])

    @property
    @override
    def compression(self) -> tuple[int, int]:
        return 0, 2 ** (len(self.pipeline.component_config("vae")["block_out_channels"]) - 1)

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKL

        return AutoencoderKL

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        return ImageVae.load(self.vae_class(), self.folder, device, dtype)

    def guidance_input(self, x: Tensor) -> Tensor | None:
        """Scale of guidance ``[batch]``, float32, for networks that take it as an input; None for others.

        Args:
            x: states ``[batch, *latent_shape]``.
        """
        if self.config.embedded_guidance is None:
            return None
        return torch.full((x.shape[0],), self.config.embedded_guidance, dtype=torch.float32, device=x.device)

"""What families of image generators share: latents of one frame, and an ``AutoencoderKL``."""

from __future__ import annotations

import torch
from torch import Tensor

from euphonium.generators.generator import Decoder, GeneratorFamily


class ImageFamily(GeneratorFamily):
    """Base of families whose pipelines hold latents without a dimension for frames."""

    @property
    def latent_channels(self) -> int:
        """See :class:`GeneratorFamily`."""
        return int(self.component_config("vae")["latent_channels"])

    @property
    def compression(self) -> tuple[int, int]:
        """See :class:`GeneratorFamily`."""
        return 0, 2 ** (len(self.component_config("vae")["block_out_channels"]) - 1)

    def load_decoder(self, device: torch.device) -> Decoder:
        """See :class:`GeneratorFamily`."""
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(self.folder / "vae", dtype=self.dtype)
        vae = self.with_decoding(vae.to(device).eval())
        # Stable Diffusion 1 has none.
        shift = vae.config.shift_factor or 0.0

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            scaled = latents.squeeze(2).to(device=device, dtype=self.dtype) / vae.config.scaling_factor + shift
            image: Tensor = vae.decode(scaled, return_dict=False)[0]
            return (image.float() / 2 + 0.5).clamp(0, 1).unsqueeze(1)

        return decode

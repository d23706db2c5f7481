"""LTX-Video: text-to-video with a T5 text encoder, in latents of 32 x 32 pixels and 8 frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.generator import Generator
from euphonium.generators.noise_grid import evenly_told
from euphonium.generators.vae import Autoencoder, VideoVae

# The network takes times from 0 to this.
TIMESTEPS = 1000
# Frames a second that positions in time are counted in: the pipeline's default.
FRAME_RATE = 25


class Ltx(Generator):
    """Adapter of ``LTXPipeline``."""

    pipeline_class = "LTXPipeline"

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.pipeline.component_config("vae")["latent_channels"])

    @property
    @override
    def compression(self) -> tuple[int, int]:
        vae = self.pipeline.component_config("vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        frames, side = vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")
        return int(frames or vae["patch_size_t"] * halvings), int(side or vae["patch_size"] * halvings)

    @override
    def told_sigmas(self, num_steps: int) -> NDArray[np.float64] | None:
        return evenly_told(self.pipeline, num_steps)

    @override
    def shifting_tokens(self) -> int:
        return math.prod(self.latent_shape[1:])

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import LTXPipeline

        pipeline = LTXPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype).to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, mask, _, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=device
            )
            # T5 reads its padding, the transformer does not; dropping it there saves its computation.
            length = int(mask.sum(dim=1).max())
            return {
                "encoder_hidden_states": hidden[:, :length].to(self.dtype),
                "encoder_attention_mask": mask[:, :length].to(self.dtype),
            }

        return encode

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKLLTXVideo

        return AutoencoderKLLTXVideo

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        return LtxVae.load(self.vae_class(), self.folder, device, dtype)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        frames, side = self.compression
        mask = conditioning["encoder_attention_mask"]
        output: Tensor = transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(self.dtype),
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            timestep=time * TIMESTEPS,
            # Without a mask kernels are faster.
            encoder_attention_mask=None if mask.is_meta or bool(mask.all()) else mask,
            num_frames=x.shape[2],
            height=x.shape[3],
            width=x.shape[4],
            rope_interpolation_scale=(frames / FRAME_RATE, side, side),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, x.shape[2:])


class LtxVae(VideoVae):
    """LTX's VAE: its latents are ``(z - mean) scaling_factor / std``, by channel, with numbers among its weights."""

    @override
    def saving_memory(self, *, tiling: bool, slicing: bool) -> Self:
        if slicing and self.network.config.timestep_conditioning:
            raise ConfigError("model.vae_slicing: diffusers' decoder of LTX-Video 0.9.1 and later cannot; leave it off")
        return super().saving_memory(tiling=tiling, slicing=slicing)

    @override
    def scaled(self, latents: Tensor) -> Tensor:
        return (latents - self._by_channel("latents_mean")) * self._factor() / self._by_channel("latents_std")

    @override
    def unscaled(self, latents: Tensor) -> Tensor:
        return latents * self._by_channel("latents_std") / self._factor() + self._by_channel("latents_mean")

    def _factor(self) -> float:
        return float(self.network.config.scaling_factor)

    def _by_channel(self, name: str) -> Tensor:
        numbers: Any = getattr(self.network, name)
        return numbers.to(device=self.device, dtype=self.dtype).view(1, -1, 1, 1, 1)

    @override
    def _decode(self, latents: Tensor) -> Tensor:
        # The later decoders remove noise; the pipeline adds none unless it is asked to.
        time = latents.new_zeros(len(latents)) if self.network.config.timestep_conditioning else None
        pixels: Tensor = self.network.decode(latents, time, return_dict=False)[0]
        return pixels

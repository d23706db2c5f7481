"""Stable Diffusion 3 and 3.5: text-to-image with two CLIP encoders and T5, guided by classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.folder import ComponentConfig
from euphonium.generators.images import ImageGenerator

TIMESTEPS = 1000.0


class StableDiffusion3(ImageGenerator):
    """Adapter of ``StableDiffusion3Pipeline``."""

    pipeline_class = "StableDiffusion3Pipeline"
    prompt_tokenizer = "tokenizer_3"

    @property
    @override
    def patch_size(self) -> int:
        return int(self.transformer_config()["patch_size"])

    @override
    def shifting_tokens(self) -> int:
        return math.prod(self.latent_shape[2:]) // self.patch_size**2

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @override
    def trunk_config(self, blocks: int) -> ComponentConfig:
        """One block more than asked for, because the last block has another shape; :meth:`build_trunk` removes it."""
        config = super().trunk_config(blocks)
        config["num_layers"] = min(blocks + 1, int(self.transformer_config()["num_layers"]))
        return config

    @override
    def build_trunk(self, blocks: int) -> nn.Module:
        trunk = super().build_trunk(blocks)
        trunk.transformer_blocks = trunk.transformer_blocks[:blocks]  # type: ignore[index]
        return trunk

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline.from_pretrained(
            self.folder, transformer=None, vae=None, dtype=self.dtype
        ).to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, _, pooled, _ = pipeline.encode_prompt(
                list(prompts), prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
                max_sequence_length=limit, device=device,
            )  # fmt: skip
            return {"encoder_hidden_states": hidden.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}

        return encode

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=x.squeeze(2).to(self.dtype), timestep=time * TIMESTEPS, return_dict=False, **conditioning
        )[0]
        return output.unsqueeze(2)

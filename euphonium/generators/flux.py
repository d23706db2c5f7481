"""FLUX.1: guidance-distilled text-to-image with CLIP and T5 text encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.images import ImageGenerator
from euphonium.generators.noise_grid import evenly_told

# The transformer reads squares of this many latents a side as one token.
PACK = 2


class Flux(ImageGenerator):
    """Adapter of ``FluxPipeline``."""

    pipeline_class = "FluxPipeline"
    prompt_tokenizer = "tokenizer_2"
    block_fields: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    @property
    @override
    def patch_size(self) -> int:
        return PACK

    @override
    def told_sigmas(self, num_steps: int) -> NDArray[np.float64] | None:
        return evenly_told(self.pipeline, num_steps)

    @override
    def shifting_tokens(self) -> int:
        return math.prod(self.latent_shape[2:]) // self.patch_size**2

    @override
    def context_parallel_plan(self) -> dict[str, Any] | None:
        from diffusers import FluxTransformer2DModel

        return dict(FluxTransformer2DModel._cp_plan)

    @override
    def shared_tokens(self) -> dict[str, int]:
        return super().shared_tokens() | {"of a prompt (model.max_prompt_tokens)": self.config.max_prompt_tokens}

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import FluxPipeline

        pipeline = FluxPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype)
        pipeline = pipeline.to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, pooled, _ = pipeline.encode_prompt(
                list(prompts), prompt_2=None, max_sequence_length=limit, device=device
            )
            return {"encoder_hidden_states": hidden.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}

        return encode

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = height // PACK, width // PACK
        output: Tensor = transformer(
            hidden_states=pack(x).to(self.dtype),
            # Multiplied by the number of timesteps inside.
            timestep=time,
            guidance=self.guidance_input(x),
            img_ids=image_positions(rows, columns, x.device),
            txt_ids=torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=x.device),
            return_dict=False,
            **conditioning,
        )[0]
        return unpack(output, rows, columns)


def pack(x: Tensor) -> Tensor:
    """Latents ``[batch, channels, 1, height, width]`` as tokens ``[batch, height / 2 * width / 2, channels * 4]``."""
    squares = x.squeeze(2).unflatten(3, (-1, PACK)).unflatten(2, (-1, PACK))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`."""
    squares = tokens.unflatten(2, (-1, PACK, PACK)).unflatten(1, (rows, columns))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).unsqueeze(2)


def image_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions ``[rows * columns, 3]`` of the tokens of an image; the first coordinate is unused."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(len(grid), 1), grid], dim=1).to(device)

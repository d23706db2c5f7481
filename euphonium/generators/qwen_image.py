"""Qwen-Image: text-to-image with a Qwen2.5-VL text encoder, guided by classifier-free guidance that keeps lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import IMAGE, Conditioning, PromptEncoder, guided
from euphonium.generators.flux import PACK, pack, unpack
from euphonium.generators.generator import Generator
from euphonium.generators.noise_grid import evenly_told
from euphonium.generators.vae import Autoencoder, VideoVae
from euphonium.generators.wan import WanVae

# Positions for which the transformer has angles, on either side of the origin.
POSITIONS = 4096


class QwenImage(Generator):
    """Adapter of ``QwenImagePipeline``."""

    pipeline_class = "QwenImagePipeline"

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.pipeline.component_config("vae")["z_dim"])

    @property
    @override
    def compression(self) -> tuple[int, int]:
        return 0, 2 ** len(self.pipeline.component_config("vae")["temperal_downsample"])

    @property
    @override
    def patch_size(self) -> int:
        return PACK

    @override
    def told_sigmas(self, num_steps: int) -> NDArray[np.float64] | None:
        return evenly_told(self.pipeline, num_steps)

    @override
    def shifting_tokens(self) -> int:
        return math.prod(self.latent_shape[2:]) // PACK**2

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    @override
    def with_exact_buffers(self, transformer: nn.Module) -> nn.Module:
        """Recomputes the angles of the rotary embedding, which are plain tensors here."""
        rope: Any = transformer.get_submodule("pos_embed")
        rope.pos_freqs = turns(rope.axes_dim, np.arange(POSITIONS), rope.theta)
        rope.neg_freqs = turns(rope.axes_dim, np.arange(-POSITIONS, 0), rope.theta)
        return transformer

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import QwenImagePipeline

        pipeline = QwenImagePipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype)
        pipeline = pipeline.to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=limit, device=device)
            seen = torch.ones(hidden.shape[:2], device=device) if mask is None else mask
            return {"encoder_hidden_states": hidden.to(self.dtype), "encoder_attention_mask": seen.to(self.dtype)}

        return encode

    @override
    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Prompts stand in an instruction, whose beginning is dropped; what is behind the prompt is cut first."""
        beginning, dropped = self.instruction(tokenizer)
        whole = super().token_counts(tokenizer, [beginning + prompt for prompt in prompts])
        return [count - dropped for count in whole]

    def instruction(self, tokenizer: Any) -> tuple[str, int]:
        """What is in front of a prompt, and how many tokens of it do not count."""
        from diffusers import QwenImagePipeline

        whole = QwenImagePipeline(*(None,) * 5)
        return whole.prompt_template_encode.partition("{}")[0], int(whole.prompt_template_encode_start_idx)

    def most_tokens(self) -> int:
        """The most tokens that the states of a prompt have."""
        return self.config.max_prompt_tokens

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        return WanVae.load(self.vae_class(), self.folder, device, dtype)

    @override
    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Guidance, with every token brought to the length of the output for the prompt."""
        rows, columns = (side // PACK for side in conditional.shape[-2:])
        wanted = pack(conditional)
        made = guided(wanted, pack(unconditional), scale)
        return unpack(made * (wanted.norm(dim=-1, keepdim=True) / made.norm(dim=-1, keepdim=True)), rows, columns)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        given = [conditioning[IMAGE].to(x.dtype)] if IMAGE in conditioning else []
        sides = [(1, part.shape[-2] // PACK, part.shape[-1] // PACK) for part in (x, *given)]
        mask = conditioning["encoder_attention_mask"].bool()
        output: Tensor = transformer(
            # A picture that is given is behind the sample.
            hidden_states=torch.cat([pack(part) for part in (x, *given)], dim=1).to(self.dtype),
            # Multiplied by the number of timesteps inside.
            timestep=time,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            # Without a mask kernels are faster.
            encoder_hidden_states_mask=None if mask.is_meta or bool(mask.all()) else mask,
            img_shapes=[sides] * len(x),
            return_dict=False,
        )[0]
        return unpack(output[:, : self.shifting_tokens()], *sides[0][1:])


def turns(widths: Sequence[int], positions: NDArray[np.int64], theta: float) -> Tensor:
    """Rotations ``[positions, half of all widths]`` of a head's rotary embedding, as complex numbers.

    Computed in numpy, because ``zero.Init`` rounds tensors that torch's constructors make.
    """
    frequencies = np.concatenate([theta ** (-np.arange(0, width, 2) / width) for width in widths])
    return torch.from_numpy(np.exp(1j * np.outer(positions, frequencies)).astype(np.complex64))

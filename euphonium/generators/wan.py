"""Wan 2.1: text-to-video with a UMT5 text encoder, guided by classifier-free guidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.generator import Conditioning, Decoder, GeneratorFamily, PromptEncoder, hold_buffers

TIMESTEPS = 1000.0


class Wan(GeneratorFamily):
    """Adapter of ``WanPipeline``, of its models with one transformer and one time for all tokens."""

    pipeline_class = "WanPipeline"

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """See :class:`GeneratorFamily`."""
        index = json.loads((folder / "model_index.json").read_text())
        if index.get("boundary_ratio") is not None:
            raise ConfigError(
                f"model.path: {folder} shares its steps between two transformers (Wan 2.2 A14B), of which one policy "
                "cannot be made; use Wan 2.1"
            )
        if index.get("expand_timesteps"):
            raise ConfigError(
                f"model.path: {folder} tells its transformer the time of each token (Wan 2.2 TI2V), which this "
                "adapter does not; use Wan 2.1"
            )
        super().__init__(folder, config)

    @property
    def latent_channels(self) -> int:
        """See :class:`GeneratorFamily`."""
        return int(self.component_config("vae")["z_dim"])

    @property
    def compression(self) -> tuple[int, int]:
        """See :class:`GeneratorFamily`."""
        vae = self.component_config("vae")
        return int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))

    @property
    def patch_size(self) -> int:
        """See :class:`GeneratorFamily`."""
        return int(self.transformer_config()["patch_size"][1])

    def transformer_class(self) -> type[nn.Module]:
        """See :class:`GeneratorFamily`."""
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel

    def with_exact_buffers(self, transformer: nn.Module) -> nn.Module:
        """See :class:`GeneratorFamily`; the tables of the rotary embedding are buffers here."""
        config = self.transformer_config()
        rope = transformer.get_submodule("rope")
        angles = rotary_angles(int(config["attention_head_dim"]), int(config["rope_max_seq_len"]))
        rope.freqs_cos = torch.from_numpy(np.cos(angles).astype(np.float32))
        rope.freqs_sin = torch.from_numpy(np.sin(angles).astype(np.float32))
        hold_buffers(rope)
        return transformer

    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """See :class:`GeneratorFamily`."""
        from diffusers import WanPipeline

        pipeline = WanPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype)
        pipeline = pipeline.to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            # The padding stays: Wan attends to it.
            hidden, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=device
            )
            return {"encoder_hidden_states": hidden.to(self.dtype)}

        return encode

    def load_decoder(self, device: torch.device) -> Decoder:
        """See :class:`GeneratorFamily`; the VAE was made to run in float32."""
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(self.folder / "vae", dtype=torch.float32)
        vae = self.with_decoding(vae.to(device).eval())
        mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            scaled = latents.to(device=device, dtype=torch.float32) * std + mean
            video: Tensor = vae.decode(scaled, return_dict=False)[0]
            return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)

        return decode

    def network(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """See :class:`GeneratorFamily`."""
        output: Tensor = transformer(
            hidden_states=x.to(self.dtype), timestep=time * TIMESTEPS, return_dict=False, **conditioning
        )[0]
        return output.float()


def rotary_angles(width: int, length: int) -> NDArray[np.float64]:
    """Angles ``[length, width]`` of the rotary embedding of a head: channels of time, rows and columns, in pairs.

    In numpy, because ``zero.Init`` rounds what torch's constructors make.
    """
    side = 2 * (width // 6)
    frequencies = [10000.0 ** (-np.arange(0, part, 2) / part) for part in (width - 2 * side, side, side)]
    return np.outer(np.arange(length), np.concatenate(frequencies).repeat(2))

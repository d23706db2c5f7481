"""HunyuanVideo: guidance-distilled text-to-video with Llama and CLIP text encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from models.generators.base import Conditioning, Decoder, GeneratorFamily, PromptEncoder, weights_mark

TIMESTEPS = 1000.0


class HunyuanVideo(GeneratorFamily):
    """Adapter of ``HunyuanVideoPipeline``."""

    pipeline_class = "HunyuanVideoPipeline"

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "vae" / "config.json").read_text()))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See :class:`GeneratorFamily`."""
        spatial = int(self._vae_config.get("spatial_compression_ratio", 8))
        temporal = int(self._vae_config.get("temporal_compression_ratio", 4))
        return (
            int(self.transformer_config()["in_channels"]),
            (self.config.frames - 1) // temporal + 1,
            self.config.height // spatial,
            self.config.width // spatial,
        )

    def transformer_class(self) -> type[nn.Module]:
        """See :class:`GeneratorFamily`."""
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    def build_trunk(self, blocks: int) -> nn.Module:
        """See :class:`GeneratorFamily`; dual-stream blocks come first."""
        config = self.transformer_config()
        dual = int(config["num_layers"])
        if not 1 <= blocks <= dual + int(config["num_single_layers"]):
            raise ConfigError(f"a trunk of {blocks} blocks cannot be cut from {self.folder}: it has no more than that")
        config["num_layers"] = min(blocks, dual)
        config["num_single_layers"] = max(0, blocks - dual)
        return self.build_transformer(config)

    def token_width(self) -> int:
        """See :class:`GeneratorFamily`."""
        config = self.transformer_config()
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def output_norm(self, transformer: nn.Module) -> nn.Module:
        """See :class:`GeneratorFamily`."""
        return transformer.get_submodule("norm_out")

    def fingerprint(self) -> dict[str, str]:
        """See :class:`GeneratorFamily`."""
        return {part: weights_mark(self.folder / part) for part in ("vae", "text_encoder", "text_encoder_2")}

    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """See :class:`GeneratorFamily`."""
        from diffusers import HunyuanVideoPipeline

        pipeline = HunyuanVideoPipeline.from_pretrained(
            self.folder, transformer=None, vae=None, torch_dtype=self.dtype, low_cpu_mem_usage=False
        ).to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, pooled, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=limit, device=device)
            # Attention masks what lies behind the longest prompt; dropping it here saves its computation.
            length = max(1, int(mask.sum(dim=1).max()))
            return {
                "encoder_hidden_states": hidden[:, :length].to(self.dtype),
                "encoder_attention_mask": mask[:, :length].to(self.dtype),
                "pooled_projections": pooled.to(self.dtype),
            }

        return encode

    def load_decoder(self, device: torch.device) -> Decoder:
        """See :class:`GeneratorFamily`."""
        import diffusers

        # The pipeline's own VAE class, or whichever the folder names.
        vae_class = getattr(diffusers, self._vae_config["_class_name"])
        vae = vae_class.from_pretrained(self.folder / "vae", torch_dtype=self.dtype, low_cpu_mem_usage=False)
        vae = vae.to(device).eval()
        self.set_decoding(vae)

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            scaled = latents.to(device=device, dtype=self.dtype) / vae.config.scaling_factor
            video: Tensor = vae.decode(scaled, return_dict=False)[0]
            return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

        return decode

    def network(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """See :class:`GeneratorFamily`."""
        arguments: dict[str, Tensor] = dict(conditioning)
        if self.config.embedded_guidance is not None:
            arguments["guidance"] = torch.full(
                (x.shape[0],), self.config.embedded_guidance * TIMESTEPS, dtype=self.dtype, device=x.device
            )
        output: Tensor = transformer(
            hidden_states=x.to(self.dtype), timestep=time * TIMESTEPS, return_dict=False, **arguments
        )[0]
        return output.float()

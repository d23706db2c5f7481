"""HunyuanVideo: guidance-distilled text-to-video with Llama and CLIP text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from euphonium.generators.generator import Conditioning, Decoder, GeneratorFamily, PromptEncoder

TIMESTEPS = 1000.0


class HunyuanVideo(GeneratorFamily):
    """Adapter of ``HunyuanVideoPipeline``."""

    pipeline_class = "HunyuanVideoPipeline"
    block_fields: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    @property
    def latent_channels(self) -> int:
        """See :class:`GeneratorFamily`."""
        return int(self.component_config("vae")["latent_channels"])

    @property
    def compression(self) -> tuple[int, int]:
        """See :class:`GeneratorFamily`."""
        vae = self.component_config("vae")
        return int(vae.get("temporal_compression_ratio", 4)), int(vae.get("spatial_compression_ratio", 8))

    @property
    def patch_size(self) -> int:
        """See :class:`GeneratorFamily`."""
        return int(self.transformer_config()["patch_size"])

    def transformer_class(self) -> type[nn.Module]:
        """See :class:`GeneratorFamily`."""
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """See :class:`GeneratorFamily`."""
        from diffusers import HunyuanVideoPipeline

        pipeline = HunyuanVideoPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype).to(
            device
        )
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

    def load_vae(self, device: torch.device) -> Any:
        """The VAE: of the pipeline's own class, or of whichever the folder names."""
        import diffusers

        vae_class = getattr(diffusers, self.component_config("vae")["_class_name"])
        return self.with_decoding(vae_class.from_pretrained(self.folder / "vae", dtype=self.dtype).to(device).eval())

    def load_decoder(self, device: torch.device) -> Decoder:
        """See :class:`GeneratorFamily`."""
        vae = self.load_vae(device)

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            scaled = latents.to(device=device, dtype=self.dtype) / vae.config.scaling_factor
            video: Tensor = vae.decode(scaled, return_dict=False)[0]
            return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

        return decode

    def network_input(self, x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        """What the transformer reads of the states; takes out of its arguments what belongs there."""
        return x

    def network(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """See :class:`GeneratorFamily`."""
        arguments: dict[str, Tensor] = dict(conditioning)
        if self.config.embedded_guidance is not None:
            arguments["guidance"] = torch.full(
                (x.shape[0],), self.config.embedded_guidance * TIMESTEPS, dtype=self.dtype, device=x.device
            )
        output: Tensor = transformer(
            hidden_states=self.network_input(x, arguments).to(self.dtype),
            timestep=time * TIMESTEPS,
            return_dict=False,
            **arguments,
        )[0]
        return output.float()

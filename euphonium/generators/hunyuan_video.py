"""HunyuanVideo: guidance-distilled text-to-video with Llama and CLIP text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.generator import Generator
from euphonium.generators.vae import Autoencoder, VideoVae

TIMESTEPS = 1000.0


class HunyuanVideo(Generator):
    """Adapter of ``HunyuanVideoPipeline``."""

    pipeline_class = "HunyuanVideoPipeline"
    block_fields: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    exchanges_tokens = True

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.pipeline.component_config("vae")["latent_channels"])

    @property
    @override
    def compression(self) -> tuple[int, int]:
        vae = self.pipeline.component_config("vae")
        return int(vae.get("temporal_compression_ratio", 4)), int(vae.get("spatial_compression_ratio", 8))

    @property
    @override
    def patch_size(self) -> int:
        return int(self.transformer_config()["patch_size"])

    @override
    def told_sigmas(self, num_steps: int) -> NDArray[np.float64]:
        return np.linspace(1.0, 0.0, num_steps + 1)[:-1]

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
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

    @override
    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Prompts stand in an instruction whose beginning is not counted."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as INSTRUCTION

        whole = super().token_counts(tokenizer, [str(INSTRUCTION["template"]).format(prompt) for prompt in prompts])
        return [count - int(INSTRUCTION["crop_start"]) for count in whole]

    @override
    def vae_class(self) -> Autoencoder:
        """The class that the folder names."""
        import diffusers

        name = self.pipeline.component_config("vae").get("_class_name")
        found = getattr(diffusers, str(name), None)
        if found is None or not hasattr(found, "decode"):
            raise ConfigError(
                f"model.path: vae/config.json of {self.folder} names the class {name!r}, which is no VAE of diffusers; "
                f"download or copy {self.folder / 'vae'} again"
            )
        return found

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        return VideoVae.load(self.vae_class(), self.folder, device, dtype)

    @override
    def prepare(self, transformer: nn.Module) -> nn.Module:
        from euphonium.generators.attention import leave_out_masks

        leave_out_masks(transformer)
        return transformer

    @override
    def context_parallel_plan(self) -> dict[str, Any] | None:
        """The latents' tokens are shared; every rank has the prompt's, which are few and of any number."""
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        positions = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
        return {
            "x_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
            "rope": {0: positions, 1: positions},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def network_input(self, x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        """The transformer's input made of the states; entries of ``arguments`` that become part of it are removed."""
        return x

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
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
        return output

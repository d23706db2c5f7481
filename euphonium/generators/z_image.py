"""Z-Image: text-to-image with a Qwen3 text encoder, in one stream of picture and text."""

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
from euphonium.generators.conditioning import Conditioning, PromptEncoder, padded_texts, seen_texts
from euphonium.generators.flux2 import conversations
from euphonium.generators.images import ImageGenerator
from euphonium.generators.noise_grid import evenly_told


class ZImage(ImageGenerator):
    """Adapter of ``ZImagePipeline``.

    Its network looks from data to noise: it takes ``1 - time``, and its output is the negative velocity.
    """

    pipeline_class = "ZImagePipeline"
    block_fields: ClassVar[tuple[str, ...]] = ("n_layers",)

    @property
    @override
    def patch_size(self) -> int:
        return int(self.transformer_config()["all_patch_size"][0])

    @override
    def told_sigmas(self, num_steps: int) -> NDArray[np.float64] | None:
        return evenly_told(self.pipeline, num_steps)

    @override
    def shifting_tokens(self) -> int:
        return self._tokens

    @property
    def _tokens(self) -> int:
        """Tokens of a picture."""
        return math.prod(self.latent_shape[2:]) // self.patch_size**2

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    @override
    def prepare(self, transformer: nn.Module) -> nn.Module:
        transformer.register_forward_hook(_as_one_tensor)
        return transformer

    @override
    def token_width(self) -> int:
        return int(self.transformer_config()["dim"])

    @override
    def output_norm(self, transformer: nn.Module) -> nn.Module:
        return transformer.get_submodule(f"all_final_layer.{self.patch_size}-1.norm_final")

    @override
    def sample_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, : self._tokens]

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import ZImagePipeline

        pipeline = ZImagePipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype)
        pipeline = pipeline.to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            texts, _ = pipeline.encode_prompt(
                list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=limit
            )
            return padded_texts(texts, self.dtype)

        return encode

    @override
    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        return super().token_counts(tokenizer, conversations(tokenizer, prompts, enable_thinking=True))

    @override
    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Guidance whose scale counts from the output for the prompt: 0 is none, not 1."""
        return conditional + scale * (conditional - unconditional)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor | list[Tensor] = transformer(
            list(x.to(self.dtype).unbind()), 1 - time, seen_texts(conditioning), return_dict=False
        )[0]
        # A list from a transformer that a pipeline has loaded by itself.
        return -(output if isinstance(output, Tensor) else torch.stack(output))


def _as_one_tensor(transformer: nn.Module, arguments: Any, output: tuple[list[Tensor]]) -> tuple[Tensor]:
    """Makes one tensor of the samples that the network returns one by one.

    ZeRO-3 follows every tensor that a module returns through the backward pass, and remembers their order: ranks whose
    micro-batches differ in size would no longer agree on when weights are gathered, and wait for each other forever.
    """
    return (torch.stack(output[0]),)

"""HunyuanVideo-1.5: text-to-video with Qwen2.5-VL and glyph (ByT5) encoders, guided by classifier-free guidance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.hunyuan_video import TIMESTEPS, HunyuanVideo
from euphonium.generators.vae import VideoVae


class HunyuanVideo15(HunyuanVideo):
    """Adapter of ``HunyuanVideo15Pipeline``."""

    pipeline_class = "HunyuanVideo15Pipeline"
    block_fields = ("num_layers",)

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import HunyuanVideo15Transformer3DModel

        return HunyuanVideo15Transformer3DModel

    @cached_property
    def _input_widths(self) -> tuple[int, int]:
        """Channels of the transformer's input, and width of an image's embedding."""
        config = self.transformer_config()
        return int(config["in_channels"]), int(config["image_embed_dim"])

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import HunyuanVideo15Pipeline
        from transformers import Qwen2_5_VLTextModel, T5EncoderModel

        from euphonium.generators.components import component_classes

        # The pipeline cannot be made without its VAE, but these two of its functions need none.
        encode_text = HunyuanVideo15Pipeline._get_mllm_prompt_embeds
        encode_glyphs = HunyuanVideo15Pipeline._get_byt5_prompt_embeds
        # By the classes that the check of the folder opens, whatever the tokenizers' own files say.
        classes = component_classes(self.pipeline)
        tokenizers: list[Any] = [classes[n].from_pretrained(self.folder / n) for n in ("tokenizer", "tokenizer_2")]
        encoders = [
            kind.from_pretrained(self.folder / name, dtype=self.dtype).to(device).eval()
            for kind, name in ((Qwen2_5_VLTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
        ]
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            text, mask = encode_text(
                encoders[0], tokenizers[0], list(prompts), device=device, tokenizer_max_length=limit
            )
            glyphs, glyph_mask = encode_glyphs(tokenizers[1], encoders[1], list(prompts), device=device)
            # What lies behind the longest prompt is masked; dropping it here saves its computation.
            # Most prompts have no glyphs at all.
            length, glyph_length = max(1, int(mask.sum(dim=1).max())), int(glyph_mask.sum(dim=1).max())
            return {
                "encoder_hidden_states": text[:, :length].to(self.dtype),
                "encoder_attention_mask": mask[:, :length].to(self.dtype),
                "encoder_hidden_states_2": glyphs[:, :glyph_length].to(self.dtype),
                "encoder_attention_mask_2": glyph_mask[:, :glyph_length].to(self.dtype),
            }

        return encode

    @override
    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Prompts stand in a conversation whose beginning is not counted."""
        from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5 as pipeline

        settings = inspect.signature(pipeline.HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
        system, dropped = settings["system_message"].default, int(settings["crop_start"].default)
        conversations = pipeline.format_text_input(list(prompts), system)
        texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return [len(tokens) - dropped for tokens in encoded]

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        vae = super().load_vae(device, dtype)
        # In diffusers 0.42 its attention mask does not fit a batch of more than one.
        vae.network.enable_slicing()
        return vae

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        in_channels, embedding = self._input_widths
        # Places of a conditioning frame and its mask: all zero without an image. Tokens of an absent image would be
        # masked; with none at all there is nothing to mask.
        absent = x.new_zeros(x.shape[0], in_channels - x.shape[1], *x.shape[2:])
        image = x.new_zeros(x.shape[0], 0, embedding, dtype=self.dtype)
        output: Tensor = transformer(
            hidden_states=torch.cat([x, absent], dim=1).to(self.dtype),
            # The embedding of time is computed in the type of the time.
            timestep=(time * TIMESTEPS).to(self.dtype),
            image_embeds=image,
            return_dict=False,
            **conditioning,
        )[0]
        return output

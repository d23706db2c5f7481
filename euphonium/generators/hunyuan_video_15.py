"""HunyuanVideo-1.5: text- and image-to-video with Qwen2.5-VL and glyph (ByT5) encoders, and guidance by CFG."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import IMAGE, Conditioning, ImageEncoder, PromptEncoder, cast
from euphonium.generators.hunyuan_video import TIMESTEPS, HunyuanVideo
from euphonium.generators.pictures import open_picture
from euphonium.generators.vae import VideoVae

# Entry with SigLIP's states of the picture; the name is the transformer's argument.
VIEW = "image_embeds"


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

    def image_input(self, x: Tensor, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Channels of a conditioning frame and its mask, and the states of an encoded picture; here of none.

        Args:
            x: float32 states ``[batch, *latent_shape]``.
            arguments: the conditioning; what becomes part of the answer is removed.
        """
        in_channels, embedding = self._input_widths
        absent = x.new_zeros(x.shape[0], in_channels - x.shape[1], *x.shape[2:])
        # Tokens of an absent picture would be masked; with none at all there is nothing to mask.
        return absent, x.new_zeros(x.shape[0], 0, embedding, dtype=self.dtype)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        arguments: dict[str, Tensor] = dict(conditioning)
        frame, embeds = self.image_input(x, arguments)
        output: Tensor = transformer(
            hidden_states=torch.cat([x, frame], dim=1).to(self.dtype),
            # The embedding of time is computed in the type of the time.
            timestep=(time * TIMESTEPS).to(self.dtype),
            image_embeds=embeds,
            return_dict=False,
            **arguments,
        )[0]
        return output


class HunyuanVideo15ImageToVideo(HunyuanVideo15):
    """Adapter of ``HunyuanVideo15ImageToVideoPipeline``.

    The transformer's input is the state, the latents of the picture as first frame, and a mask of that frame; its text
    goes with SigLIP's states of the picture. The pipeline takes the size from the picture, here it is the recipe's:
    pictures are cut to its proportions.
    """

    pipeline_class = "HunyuanVideo15ImageToVideoPipeline"
    takes_image = True
    image_components = ("image_encoder", "feature_extractor")

    @override
    def context_parallel_plan(self) -> dict[str, Any] | None:
        return None

    @override
    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        vision = self.pipeline.component_config("image_encoder")
        tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
        return super().image_shapes() | {VIEW: (tokens, int(vision["hidden_size"]))}

    @override
    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

        from euphonium.generators.components import component_classes

        classes = component_classes(self.pipeline)
        network, extractor = (classes[name].from_pretrained(self.folder / name) for name in self.image_components)
        network = network.to(device=device, dtype=self.dtype).eval()
        vae = self.load_working_vae(device)
        processor = HunyuanVideo15ImageProcessor(vae_scale_factor=self.compression[1], do_resize=False)
        height, width = self.config.height, self.config.width

        @torch.no_grad()
        def view(picture: Image.Image) -> Tensor:
            pixels = extractor.preprocess(images=picture, do_resize=True, return_tensors="pt", do_convert_rgb=True)
            states: Tensor = network(**pixels.to(device=device, dtype=self.dtype)).last_hidden_state
            return states

        def encode(files: Sequence[Path]) -> Conditioning:
            cut = [processor.resize(open_picture(f), height=height, width=width, resize_mode="crop") for f in files]
            pixels = [processor.preprocess(picture, height=height, width=width) / 2 + 0.5 for picture in cut]
            entries = {IMAGE: torch.cat([vae.encode(frame.unsqueeze(1)) for frame in pixels])}
            return cast(entries | {VIEW: torch.cat([view(picture) for picture in cut])}, self.dtype)

        return encode

    @override
    def image_input(self, x: Tensor, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first = arguments.pop(IMAGE).to(x.dtype)
        given = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        return functional.pad(given, (0, 0, 0, 0, 0, x.shape[2] - 1)), arguments.pop(VIEW)

"""Qwen-Image-Edit: image and text to image, where the text encoder reads the instruction together with the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from euphonium.generators.conditioning import (
    IMAGE,
    NEGATIVE,
    Conditioning,
    ImageEncoder,
    PromptEncoder,
    cast,
    stack_conditionings,
    with_pictures,
)
from euphonium.generators.pictures import cut_picture
from euphonium.generators.qwen_image import QwenImage

# What encodes texts, each with the picture in a file.
Reader = Callable[[Sequence[str], Sequence[Path]], Conditioning]

# The most tokens between the instruction's beginning and the text of a prompt, besides those of the picture.
MARKS = 8


class QwenImageEdit(QwenImage):
    """Adapter of ``QwenImageEditPipeline``.

    The transformer reads the tokens of the given picture behind those of the sample. The pipeline brings pictures to an
    area of 1024 x 1024 pixels, whatever it draws; here they are cut to the sample's proportions, and have its size.
    """

    pipeline_class = "QwenImageEditPipeline"
    takes_image = True
    reads_text_with_image = True
    # What the pipeline writes between the instruction's beginning and the text of a prompt.
    picture_mark: ClassVar[str] = ""

    @property
    def _kind(self) -> Any:
        """The pipeline's class."""
        import diffusers

        return getattr(diffusers, self.pipeline_class)

    def view_size(self) -> tuple[int, int]:
        """Height and width of the picture that the text encoder's processor gets."""
        return self.config.height, self.config.width

    @override
    def sample_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, : self.shifting_tokens()]

    @override
    def instruction(self, tokenizer: Any) -> tuple[str, int]:
        beginning = self._kind(*(None,) * 6).prompt_template_encode.partition("{}")[0] + self.picture_mark
        return beginning, len(tokenizer(beginning).input_ids)

    @override
    def most_tokens(self) -> int:
        return self._picture_tokens + MARKS + self.config.max_prompt_tokens

    @cached_property
    def _picture_tokens(self) -> int:
        """Tokens that the text encoder makes of a picture."""
        from transformers import AutoImageProcessor

        reader: Any = AutoImageProcessor.from_pretrained(self.folder / "processor")
        return int(reader.get_number_of_image_patches(*self.view_size())) // int(reader.merge_size) ** 2

    @override
    def prompt_encoder(
        self,
        device: torch.device,
        images: Mapping[str, Path] | None = None,
        encode: PromptEncoder | None = None,
    ) -> PromptEncoder:
        if encode is not None:
            raise self.never_encoded_alone("prompts.embeddings")
        read = self._load_reader(device)

        def read_all(prompts: Sequence[str]) -> Conditioning:
            files = [self.picture_of(prompt, images) for prompt in prompts]
            whole = read(prompts, files)
            if self.config.cfg_scale is None:
                return whole
            against = read([self.config.negative_prompt] * len(prompts), files)
            return whole | {NEGATIVE + name: tensor for name, tensor in against.items()}

        return with_pictures(read_all, self.load_image_encoder(device), lambda prompt: self.picture_of(prompt, images))

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        raise self.never_encoded_alone("model.path")

    def _load_reader(self, device: torch.device) -> Reader:
        """Loads the text encoder, and what prepares texts and pictures for it."""
        from euphonium.generators.components import open_pipeline

        pipeline = open_pipeline(self._kind, self.folder, transformer=None, vae=None, dtype=self.dtype).to(device)
        # One token of what is in front of the text is that of the picture, in whose place its own are put.
        marks = self.instruction(pipeline.tokenizer)[1] - 1 - int(pipeline.prompt_template_encode_start_idx)
        kept = marks + self._picture_tokens + self.config.max_prompt_tokens

        @torch.no_grad()
        def read_one(prompt: str, file: Path) -> Conditioning:
            picture = cut_picture(file, *self.view_size())
            hidden, _ = pipeline.encode_prompt(prompt, image=[picture], device=device)
            states = hidden[:, :kept].to(self.dtype)
            seen = torch.ones(states.shape[:2], dtype=self.dtype, device=device)
            return {"encoder_hidden_states": states, "encoder_attention_mask": seen}

        def read(prompts: Sequence[str], files: Sequence[Path]) -> Conditioning:
            # Of pictures in one call the newer pipeline makes one prompt.
            return stack_conditionings([read_one(*pair) for pair in zip(prompts, files, strict=True)])

        return read

    @override
    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        from diffusers.image_processor import VaeImageProcessor

        vae = self.load_working_vae(device)
        processor = VaeImageProcessor(do_resize=False, do_normalize=False)
        size = self.config.height, self.config.width

        def encode(files: Sequence[Path]) -> Conditioning:
            pixels = [processor.preprocess(cut_picture(file, *size)).unsqueeze(1) for file in files]
            return cast({IMAGE: torch.cat([vae.encode(frame) for frame in pixels])}, self.dtype)

        return encode


class QwenImageEditPlus(QwenImageEdit):
    """Adapter of ``QwenImageEditPlusPipeline``, with one picture; its text encoder reads a smaller copy of it."""

    pipeline_class = "QwenImageEditPlusPipeline"
    picture_mark = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"

    @override
    def view_size(self) -> tuple[int, int]:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as pipeline

        width, height = pipeline.calculate_dimensions(
            pipeline.CONDITION_IMAGE_SIZE, self.config.width / self.config.height
        )
        return height, width

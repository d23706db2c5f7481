"""The tiny pipeline of MiniMax-H3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from euphonium.generators.generator import Generator
from euphonium.generators.minimax_h3 import SOUND_CHANNELS, MiniMaxH3
from tests.euphonium.generators.tiny_parts import TEXT
from tests.euphonium.generators.tiny_qwen import qwen_tokenizer

# Of the levels of video and sound.
SHIFTS = (12.0, 3.0)
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def minimax_h3() -> Any:
    """MiniMax-H3 for text to video with sound; the text encoder has as many layers as are read."""
    from diffusers import (
        AutoencoderKLMiniMaxH3,
        AutoencoderKLMiniMaxH3Audio,
        MiniMaxH3Blocks,
        MiniMaxH3Scheduler,
        MiniMaxH3Transformer3DModel,
    )
    from transformers import Qwen2VLImageProcessor

    tokenizer = qwen_tokenizer(VISION)
    pipeline = MiniMaxH3Blocks().init_pipeline()
    pipeline.update_components(
        scheduler=MiniMaxH3Scheduler(shift=SHIFTS[0]),
        audio_scheduler=MiniMaxH3Scheduler(shift=SHIFTS[1]),
        transformer=MiniMaxH3Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=3, num_refiner_layers=1,
            ffn_dim=32, in_channels=4, audio_in_channels=8, text_dim=TEXT, freq_dim=16, time_embed_hidden_dim=16,
            time_embed_dim=16, rope_freq_dim=2,
        ),
        vae=AutoencoderKLMiniMaxH3(
            latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_downsample_factors=(2, 2, 1),
            temporal_downsample_factors=(1, 2, 2), norm_num_groups=4, decoder_num_layers=1,
            decoder_num_attention_heads=2, decoder_attention_head_dim=16, decoder_ffn_mult=2,
            latents_mean=(-0.7, 0.1, 0.3, -0.2), latents_std=(2.8, 1.4, 2.3, 0.9),
        ),
        audio_vae=AutoencoderKLMiniMaxH3Audio(
            encoder_dim=2, encoder_rates=(2, 2), latent_dim=16, latent_channels=8, num_attention_heads=2,
            decoder_dim=8, decoder_rates=(2, 2), decoder_kernel_sizes=(4, 4), resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),), latents_mean=[0.1] * 8, latents_std=[1.5] * 8,
        ),
        text_encoder=qwen3_vision_text(tokenizer),
        tokenizer=tokenizer,
        processor=without_videos()(Qwen2VLImageProcessor(patch_size=2, merge_size=2), tokenizer),
    )  # fmt: skip
    name = ("transformers", "Qwen3VLProcessor")
    pipeline.register_to_config(processor=(*name, pipeline.config["processor"][2] | {"type_hint": name}))
    return pipeline


def qwen3_vision_text(tokenizer: Any) -> Any:
    """Qwen3-VL."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    end, image, video = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|image_pad|>", "<|video_pad|>"])
    text = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT, "intermediate_size": TEXT, "num_hidden_layers": 51,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": end,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT,
        "patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video)
    )


@cache
def without_videos() -> Any:
    """Qwen3-VL's processor without its reader of videos, which needs torchvision."""
    from transformers import Qwen3VLProcessor

    class Processor(Qwen3VLProcessor):
        # The base takes the parts of a processor from the names of these arguments.
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    return Processor


def open_minimax_h3(folder: Path) -> Any:
    """The pipeline in a folder, as diffusers opens it, with what reads its prompts."""
    from diffusers import ModularPipeline

    pipeline = ModularPipeline.from_pretrained(folder, workflow="t2va")
    pipeline.load_components([name for name in pipeline.pretrained_component_names if name != "processor"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.update_components(processor=without_videos().from_pretrained(folder / "processor"))
    return pipeline


def minimax_h3_samples(
    family: Generator, start: Tensor, prompts: Sequence[str], steps: int, output_type: str
) -> Tensor:
    """What the pipeline makes of the given noise, one prompt at a time: states, or pixels for ``pt``."""
    runs = minimax_h3_run(family, start, prompts, steps)
    return torch.cat([state.get("videos") if output_type == "pt" else states for states, state in runs])


def minimax_h3_run(family: Generator, start: Tensor, prompts: Sequence[str], steps: int) -> list[tuple[Tensor, Any]]:
    """States that the pipeline makes of the given noise, and its own state at the end, for one prompt at a time.

    Its shortest clip, of five seconds, is left out of account.
    """
    from diffusers import MiniMaxH3ModularPipeline
    from diffusers.modular_pipelines.minimax_h3.before_denoise import patchify_video_latents

    assert isinstance(family, MiniMaxH3)
    pipeline, config, made = open_minimax_h3(family.folder), family.config, []
    patch = tuple(pipeline.transformer.config.patch_size)
    video, sound = family.layout.tokens_of(start)
    with pytest.MonkeyPatch.context() as change:
        change.setattr(MiniMaxH3ModularPipeline, "min_duration", 0.0)
        for prompt, latents, tokens in zip(prompts, family.layout.latents_of(video), sound, strict=True):
            # The end of the walk counts as a step there.
            state = pipeline(
                prompt=prompt, height=config.height, width=config.width, num_frames=config.frames,
                num_inference_steps=steps + 1, latents=latents.unsqueeze(0), output_type="pt",
                audio_latents=tokens.unflatten(0, (SOUND_CHANNELS, -1)).transpose(1, 2),
            )  # fmt: skip
            ours = patchify_video_latents(state.get("latents"), patch).unsqueeze(0)
            theirs = state.get("audio_latents").transpose(1, 2).flatten(0, 1).unsqueeze(0)
            made.append((family.states(ours, theirs * SHIFTS[0] / SHIFTS[1]), state))
    return made

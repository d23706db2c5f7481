"""Inputs of a generator's network, on the meta device or random: states, times, and prompts of the greatest length.

The entries of a conditioning are those that the family's prompt encoder makes; prompts take
``model.max_prompt_tokens``, so that what is measured is the most that a run meets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from euphonium.errors import ConfigError
from euphonium.generators.conditioning import NEGATIVE, Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.ltx2 import Ltx2
from euphonium.generators.qwen_image import QwenImage

META = torch.device("meta")

# Tokens of CLIP's text encoder, and the most of HunyuanVideo-1.5's encoder of quoted text.
CLIP_TOKENS, GLYPH_TOKENS = 77, 256


def states(generator: Generator, batch: int, device: torch.device = META) -> tuple[Tensor, Tensor]:
    """States ``[batch, *latent]`` and times ``[batch]``, float32."""
    return torch.randn(batch, *generator.latent_shape, device=device), torch.zeros(batch, device=device)


def conditioning(generator: Generator, batch: int, device: torch.device = META) -> Conditioning:
    """A conditioning of the longest prompts, with those of the negative prompt where there is guidance by one.

    Raises:
        ConfigError: a family whose prompts are not described here.
    """
    if generator.pipeline_class not in PROMPTS:
        raise ConfigError(f"model.path: a {generator.pipeline_class} cannot be planned: its prompts are not described")
    entries = PROMPTS[generator.pipeline_class](generator) | generator.image_shapes()
    made: Conditioning = {}
    for name, shape in entries.items():
        fill = torch.ones if "mask" in name else torch.randn
        made[name] = fill(batch, *shape, dtype=generator.dtype, device=device)
    if generator.config.cfg_scale is not None:
        made |= {NEGATIVE + name: tensor for name, tensor in made.items()}
    return made


_Shapes = dict[str, tuple[int, ...]]


def _hunyuan_video(generator: Generator) -> _Shapes:
    config, length = generator.transformer_config(), generator.config.max_prompt_tokens
    return {
        "encoder_hidden_states": (length, int(config["text_embed_dim"])),
        "encoder_attention_mask": (length,),
        "pooled_projections": (int(config["pooled_projection_dim"]),),
    }


def _hunyuan_video_15(generator: Generator) -> _Shapes:
    config, length = generator.transformer_config(), generator.config.max_prompt_tokens
    return {
        "encoder_hidden_states": (length, int(config["text_embed_dim"])),
        "encoder_attention_mask": (length,),
        "encoder_hidden_states_2": (GLYPH_TOKENS, int(config["text_embed_2_dim"])),
        "encoder_attention_mask_2": (GLYPH_TOKENS,),
    }


def _wan(generator: Generator) -> _Shapes:
    return {
        "encoder_hidden_states": (generator.config.max_prompt_tokens, int(generator.transformer_config()["text_dim"]))
    }


def _qwen_image(generator: Generator) -> _Shapes:
    assert isinstance(generator, QwenImage)
    length, width = generator.most_tokens(), int(generator.transformer_config()["joint_attention_dim"])
    return {"encoder_hidden_states": (length, width), "encoder_attention_mask": (length,)}


def _z_image(generator: Generator) -> _Shapes:
    length = generator.config.max_prompt_tokens
    width = int(generator.transformer_config()["cap_feat_dim"])
    return {"encoder_hidden_states": (length, width), "encoder_attention_mask": (length,)}


def _ltx(generator: Generator) -> _Shapes:
    length, width = generator.config.max_prompt_tokens, int(generator.transformer_config()["caption_channels"])
    return {"encoder_hidden_states": (length, width), "encoder_attention_mask": (length,)}


def _minimax_h3(generator: Generator) -> _Shapes:
    length, width = generator.config.max_prompt_tokens, int(generator.transformer_config()["text_dim"])
    return {"encoder_hidden_states": (length, width), "encoder_attention_mask": (length,)}


def _ltx2(generator: Generator) -> _Shapes:
    assert isinstance(generator, Ltx2)
    length, (video, audio) = generator.config.max_prompt_tokens, generator.text_widths()
    return {"encoder_hidden_states": (length, video), "audio_encoder_hidden_states": (length, audio)}


def _flux2(generator: Generator) -> _Shapes:
    width = int(generator.transformer_config()["joint_attention_dim"])
    return {"encoder_hidden_states": (generator.config.max_prompt_tokens, width)}


def _flux(generator: Generator) -> _Shapes:
    config = generator.transformer_config()
    return {
        "encoder_hidden_states": (generator.config.max_prompt_tokens, int(config["joint_attention_dim"])),
        "pooled_projections": (int(config["pooled_projection_dim"]),),
    }


def _stable_diffusion_3(generator: Generator) -> _Shapes:
    config = generator.transformer_config()
    return {
        "encoder_hidden_states": (CLIP_TOKENS + generator.config.max_prompt_tokens, int(config["joint_attention_dim"])),
        "pooled_projections": (int(config["pooled_projection_dim"]),),
    }


def _stable_diffusion(generator: Generator) -> _Shapes:
    return {"encoder_hidden_states": (CLIP_TOKENS, int(generator.transformer_config()["cross_attention_dim"]))}


PROMPTS: dict[str, Callable[[Generator], _Shapes]] = {
    "HunyuanVideoPipeline": _hunyuan_video,
    "HunyuanSkyreelsImageToVideoPipeline": _hunyuan_video,
    "HunyuanVideo15Pipeline": _hunyuan_video_15,
    "HunyuanVideo15ImageToVideoPipeline": _hunyuan_video_15,
    "WanPipeline": _wan,
    "WanImageToVideoPipeline": _wan,
    "LTXPipeline": _ltx,
    "MiniMaxH3ModularPipeline": _minimax_h3,
    "LTX2Pipeline": _ltx2,
    "FluxPipeline": _flux,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2,
    "ZImagePipeline": _z_image,
    "QwenImagePipeline": _qwen_image,
    "QwenImageEditPipeline": _qwen_image,
    "QwenImageEditPlusPipeline": _qwen_image,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "StableDiffusionPipeline": _stable_diffusion,
}

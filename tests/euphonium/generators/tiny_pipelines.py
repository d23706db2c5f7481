"""Pipelines of the real diffusers and transformers classes with random weights, a few thousand parameters each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

# Folder of a saved pipeline, by its class: a fixture of tests/euphonium.
Folders = Callable[[str], Path]

TEXT = 32
CLIP_TOKENS = 48


def clip_tokenizer() -> Any:
    """CLIP's tokenizer, of single bytes."""
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> Any:
    """T5's tokenizer, of single letters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((chr(code), -3.0) for code in range(33, 127))], extra_ids=0)


def clip_encoder(tokenizer: Any, *, projects: bool = False) -> Any:
    """CLIP's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=TEXT, projection_dim=TEXT, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CLIP_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)


def t5_encoder(vocabulary: int, width: int = TEXT) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2,
                 feed_forward_proj="gated-gelu")
    )  # fmt: skip


def image_vae(**changes: Any) -> Any:
    """The VAE of image models: pixels to latents of half the size, 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        **changes,
    )  # fmt: skip


def flow_scheduler(**options: Any) -> Any:
    """Euler's scheduler of flow-matching models."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def flux() -> Any:
    """FLUX.1 dev, with its resolution-dependent shift."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, shift=3.0),
        vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(len(t5)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=TEXT, pooled_projection_dim=TEXT, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3.5, with dual attention in its first block."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=2 * TEXT, caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=flow_scheduler(shift=3.0),
        vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(first, projects=True),
        tokenizer=first,
        text_encoder_2=clip_encoder(second, projects=True),
        tokenizer_2=second,
        text_encoder_3=t5_encoder(len(t5), 2 * TEXT),
        tokenizer_3=t5,
    )  # fmt: skip


def wan() -> Any:
    """Wan 2.1."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    t5 = t5_tokenizer()
    return WanPipeline(
        tokenizer=t5,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(t5), d_model=TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[-0.7, 0.1, 0.3, -0.2], latents_std=[2.8, 1.4, 2.3, 0.9], scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=TEXT, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
        ),
    )  # fmt: skip


def stable_diffusion() -> Any:
    """Stable Diffusion 1.4, with the scheduler that its repository names and without its safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    clip = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=image_vae(scaling_factor=0.18215),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT, attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def hunyuan_video() -> Any:
    """HunyuanVideo with its guidance scale as an input, around the embedded generator's text side."""
    from diffusers import HunyuanVideoPipeline

    from euphonium.embedded.text import (
        POOLED_DIM,
        TEXT_DIM,
        build_pooled_encoder,
        build_pooled_tokenizer,
        build_prompt_encoder,
        build_prompt_tokenizer,
    )

    tokenizer, pooled = build_prompt_tokenizer(), build_pooled_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=build_prompt_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=hunyuan_transformer(4, text_embed_dim=TEXT_DIM, pooled_projection_dim=POOLED_DIM),
        vae=hunyuan_vae(),
        scheduler=flow_scheduler(shift=7.0),
        text_encoder_2=build_pooled_encoder(pooled),
        tokenizer_2=pooled,
    )


def skyreels_image_to_video() -> Any:
    """SkyReels V1, image to video."""
    from diffusers import HunyuanSkyreelsImageToVideoPipeline

    parts = hunyuan_video().components
    text, pooled = parts["text_encoder"].config.hidden_size, parts["text_encoder_2"].config.hidden_size
    parts["transformer"] = hunyuan_transformer(8, text_embed_dim=text, pooled_projection_dim=pooled)
    # The pipeline draws the first frame's latents: a distribution as narrow as diffusers allows makes them certain.
    moments = parts["vae"].quant_conv
    moments.weight.data[4:] = 0
    moments.bias.data[4:] = -30
    return HunyuanSkyreelsImageToVideoPipeline(**parts)


def hunyuan_transformer(in_channels: int, **options: Any) -> Any:
    """HunyuanVideo's transformer, one block of each kind."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=in_channels, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, rope_axes_dim=(4, 6, 6), guidance_embeds=True,
        **options,
    )  # fmt: skip


def hunyuan_vae() -> Any:
    """HunyuanVideo's VAE in its smallest shape: 4 frames and 8 pixels a side to a latent."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip


def hunyuan_video_15() -> Any:
    """HunyuanVideo-1.5."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*letters, "<|endoftext|>", "<|system|>", "<|end|>"])}
    qwen = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"system": "<|system|>", "end": "<|end|>"})
    # The pipeline drops the first 108 tokens, which are the system message's in the published tokenizer.
    qwen.chat_template = "<|system|>" * 108 + "{{ messages[-1].content }}<|end|>"
    glyphs = ByT5Tokenizer()
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(qwen), hidden_size=TEXT, intermediate_size=TEXT, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None,
                eos_token_id=vocabulary["<|endoftext|>"], pad_token_id=vocabulary["<|endoftext|>"],
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            )
        ),
        tokenizer=qwen,
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT, text_embed_2_dim=TEXT, image_embed_dim=16,
            rope_axes_dim=(4, 6, 6), target_size=32, task_type="t2v",
        ),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(16, 16, 16), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=2,
        ),
        scheduler=flow_scheduler(shift=5.0),
        text_encoder_2=t5_encoder(len(glyphs)),
        tokenizer_2=glyphs,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "FluxPipeline": flux,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "WanPipeline": wan,
    "StableDiffusionPipeline": stable_diffusion,
    "HunyuanVideoPipeline": hunyuan_video,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "HunyuanSkyreelsImageToVideoPipeline": skyreels_image_to_video,
}


# What a sample of each is, where it is not an image of 16 x 16 pixels, and how it is guided.
SHAPES: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"embedded_guidance": 3.5},
    "StableDiffusion3Pipeline": {"cfg_scale": 4.5},
    "WanPipeline": {"frames": 5, "cfg_scale": 5.0},
    "StableDiffusionPipeline": {"cfg_scale": 7.5},
    "HunyuanVideoPipeline": {"frames": 5, "height": 32, "width": 32, "embedded_guidance": 6.0},
    "HunyuanVideo15Pipeline": {"frames": 5, "cfg_scale": 6.0},
    "HunyuanSkyreelsImageToVideoPipeline": {
        "frames": 5,
        "height": 32,
        "width": 32,
        "embedded_guidance": 1.0,
        "cfg_scale": 6.0,
    },
}


def model_fields(pipeline_class: str, folder: Path) -> dict[str, Any]:
    """Fields of a recipe's ``model`` for a pipeline that was saved to a folder."""
    return {"path": str(folder), "height": 16, "width": 16, "max_prompt_tokens": 16} | SHAPES[pipeline_class]


def build_pipeline(pipeline_class: str, seed: int = 0) -> Any:
    """A pipeline whose network answers to all of its inputs: as initialised, gates and outputs are close to zero."""
    torch.manual_seed(seed)
    pipeline = BUILDERS[pipeline_class]()
    backbone = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter.data.flatten(1))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""Pipelines of the real diffusers and transformers classes with random weights, a few thousand parameters each.

``python -m tests.euphonium.generators.tiny_pipelines "WanPipeline 2.2" FOLDER`` writes one as the hub has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

from euphonium.generators.components import open_pipeline
from tests.euphonium.generators.tiny_flux2 import flux2_dev, flux2_klein
from tests.euphonium.generators.tiny_ltx import ltx, ltx_timestep_conditioned
from tests.euphonium.generators.tiny_ltx2 import ltx2, ltx2_3
from tests.euphonium.generators.tiny_minimax_h3 import minimax_h3, open_minimax_h3
from tests.euphonium.generators.tiny_parts import (
    TEXT,
    clip_encoder,
    clip_tokenizer,
    flow_scheduler,
    image_vae,
    t5_encoder,
    t5_tokenizer,
)
from tests.euphonium.generators.tiny_qwen import qwen_image, qwen_image_edit, qwen_image_edit_plus, z_image
from tests.euphonium.generators.tiny_wan import (
    wan,
    wan_22,
    wan_experts,
    wan_image_to_video,
    wan_image_to_video_experts,
)

# Folder of a saved pipeline, by its name in :data:`BUILDERS`: a fixture of tests/euphonium.
Folders = Callable[[str], Path]


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


def hunyuan_video_15_image_to_video() -> Any:
    """HunyuanVideo-1.5, image to video, with SigLIP's view of pictures of 28 x 28 pixels."""
    from diffusers import HunyuanVideo15ImageToVideoPipeline
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **hunyuan_video_15().components,
        image_encoder=SiglipVisionModel(siglip),
        feature_extractor=SiglipImageProcessor(size={"height": 28, "width": 28}),
    )


# By the class as which they are opened, and a word for further models of the same class.
BUILDERS: dict[str, Callable[[], Any]] = {
    "FluxPipeline": flux,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "Flux2Pipeline": flux2_dev,
    "Flux2KleinPipeline": flux2_klein,
    "QwenImagePipeline": qwen_image,
    "QwenImageEditPipeline": qwen_image_edit,
    "QwenImageEditPlusPipeline": qwen_image_edit_plus,
    "ZImagePipeline": z_image,
    "LTXPipeline": ltx,
    "LTXPipeline 0.9.1": ltx_timestep_conditioned,
    "MiniMaxH3ModularPipeline": minimax_h3,
    "LTX2Pipeline": ltx2,
    "LTX2Pipeline 2.3": ltx2_3,
    "WanPipeline": wan,
    "WanPipeline 2.2": wan_22,
    "WanPipeline A14B": wan_experts,
    "WanImageToVideoPipeline": wan_image_to_video,
    "WanImageToVideoPipeline A14B": wan_image_to_video_experts,
    "WanImageToVideoPipeline 2.2": wan_22,
    "StableDiffusionPipeline": stable_diffusion,
    "HunyuanVideoPipeline": hunyuan_video,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "HunyuanVideo15ImageToVideoPipeline": hunyuan_video_15_image_to_video,
    "HunyuanSkyreelsImageToVideoPipeline": skyreels_image_to_video,
}


# What a sample of each is, where it is not an image of 16 x 16 pixels, and how it is guided.
SHAPES: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"embedded_guidance": 3.5},
    "StableDiffusion3Pipeline": {"cfg_scale": 4.5},
    "ZImagePipeline": {"cfg_scale": 3.0},
    "Flux2Pipeline": {"embedded_guidance": 4.0},
    "Flux2KleinPipeline": {"cfg_scale": 4.0},
    "QwenImagePipeline": {"cfg_scale": 4.0},
    "QwenImageEditPipeline": {"cfg_scale": 4.0},
    "QwenImageEditPlusPipeline": {"cfg_scale": 4.0},
    "LTXPipeline": {"frames": 5, "height": 32, "width": 32, "cfg_scale": 3.0},
    "LTXPipeline 0.9.1": {"frames": 5, "height": 32, "width": 32, "cfg_scale": 3.0},
    "MiniMaxH3ModularPipeline": {"frames": 22},
    "LTX2Pipeline": {"frames": 5, "height": 32, "width": 32, "cfg_scale": 4.0},
    "LTX2Pipeline 2.3": {"frames": 5, "height": 32, "width": 32, "cfg_scale": 3.0},
    "WanPipeline": {"frames": 5, "cfg_scale": 5.0},
    "WanPipeline 2.2": {"frames": 5, "cfg_scale": 5.0},
    "WanPipeline A14B": {"frames": 5, "cfg_scale": 4.0, "cfg_scale_2": 3.0},
    "WanImageToVideoPipeline A14B": {"frames": 5, "cfg_scale": 3.5, "trained": "low_noise"},
    "WanImageToVideoPipeline": {"frames": 5, "cfg_scale": 5.0, "max_prompt_tokens": 512},
    "WanImageToVideoPipeline 2.2": {"frames": 5, "cfg_scale": 5.0, "pipeline": "WanImageToVideoPipeline"},
    "StableDiffusionPipeline": {"cfg_scale": 7.5},
    "HunyuanVideoPipeline": {"frames": 5, "height": 32, "width": 32, "embedded_guidance": 6.0},
    "HunyuanVideo15Pipeline": {"frames": 5, "cfg_scale": 6.0},
    "HunyuanVideo15ImageToVideoPipeline": {"frames": 5, "height": 32, "width": 32, "cfg_scale": 6.0},
    "HunyuanSkyreelsImageToVideoPipeline": {
        "frames": 5,
        "height": 32,
        "width": 32,
        "embedded_guidance": 1.0,
        "cfg_scale": 6.0,
    },
}


def model_fields(name: str, folder: Path) -> dict[str, Any]:
    """Fields of a recipe's ``model`` for a pipeline that was saved to a folder."""
    return {"path": str(folder), "height": 16, "width": 16, "max_prompt_tokens": 16} | SHAPES[name]


def build_pipeline(name: str, seed: int = 0) -> Any:
    """A pipeline whose network answers to all of its inputs: as initialised, gates and outputs are close to zero."""
    torch.manual_seed(seed)
    pipeline = BUILDERS[name]()
    for name in ("unet", "transformer", "transformer_2"):
        network = getattr(pipeline, name, None)
        for parameter in network.parameters() if network is not None else ():
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter.data.flatten(1))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(name: str, folder: Path) -> None:
    """Saves a pipeline as the hub has it."""
    from diffusers import ModularPipeline

    pipeline = build_pipeline(name)
    modular = {"overwrite_modular_index": True} if isinstance(pipeline, ModularPipeline) else {}
    pipeline.save_pretrained(str(folder), **modular)


def open_saved(folder: Path) -> Any:
    """The pipeline in a folder, as diffusers opens it."""
    from diffusers import DiffusionPipeline

    modular = not (folder / "model_index.json").is_file()
    return open_minimax_h3(folder) if modular else open_pipeline(DiffusionPipeline, folder)


if __name__ == "__main__":
    save_pipeline(sys.argv[1], Path(sys.argv[2]))

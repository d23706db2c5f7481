"""Tiny pipelines of LTX-2 and LTX-2.3."""

from __future__ import annotations

import string
from typing import Any

import torch

from tests.euphonium.generators.tiny_parts import TEXT, flow_scheduler

# Channels of a token of the video, and of one of the sound.
CHANNELS = 4
LAYERS = 2
# Widths of the transformer's two streams, and of what they attend to of a prompt.
VIDEO, AUDIO = 32, 16


def ltx2() -> Any:
    """LTX-2, with the entries of the published scheduler."""
    return _pipeline(transformer={"caption_channels": TEXT}, connectors={})


def ltx2_3() -> Any:
    """LTX-2.3, whose connectors have a width for each stream and whose transformer has gates."""
    gates = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn")
    return _pipeline(
        transformer=dict.fromkeys(gates, True) | {"use_prompt_embeddings": False},
        connectors={
            "video_gated_attn": True, "audio_gated_attn": True, "per_modality_projections": True, "proj_bias": True,
            "video_hidden_dim": VIDEO, "audio_hidden_dim": AUDIO, "audio_connector_attention_head_dim": AUDIO // 2,
        },
    )  # fmt: skip


def _pipeline(transformer: dict[str, Any], connectors: dict[str, Any]) -> Any:
    from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    tokenizer = gemma_tokenizer()
    options = {
        "caption_channels": TEXT, "text_proj_in_factor": LAYERS + 1, "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": TEXT // 2, "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": 8, "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": TEXT // 2, "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": 8, "connector_rope_base_seq_len": 32, "rope_type": "split",
    }  # fmt: skip
    return LTX2Pipeline(
        scheduler=flow_scheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, base_shift=0.95, max_shift=2.05,
            shift_terminal=0.1,
        ),
        vae=video_vae(),
        audio_vae=audio_vae(),
        text_encoder=gemma(len(tokenizer)),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(**(options | connectors)),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=VIDEO // 2,
            cross_attention_dim=VIDEO, vae_scale_factors=(2, 8, 8), base_height=64, base_width=64,
            audio_in_channels=CHANNELS, audio_out_channels=CHANNELS, audio_num_attention_heads=2,
            audio_attention_head_dim=AUDIO // 2, audio_cross_attention_dim=AUDIO, num_layers=3, rope_type="split",
            **transformer,
        ),
        vocoder=LTX2Vocoder(
            in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]],
        ),
    )  # fmt: skip


def gemma_tokenizer() -> Any:
    """Gemma's tokenizer, of single letters."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    letters = [*special, *string.ascii_letters, *string.digits, *string.punctuation]
    return GemmaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])


def gemma(vocabulary: int) -> Any:
    """Gemma 3, with its reader of pictures."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": vocabulary + 3, "hidden_size": TEXT, "intermediate_size": TEXT, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 1024,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=1, boi_token_index=vocabulary,
            eoi_token_index=vocabulary + 1, image_token_index=vocabulary + 2,
        )
    )  # fmt: skip


def video_vae() -> Any:
    """LTX-2's VAE of video in its smallest shape: 2 frames and 8 pixels a side to a latent."""
    from diffusers import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS, block_out_channels=(8,), down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(False,),
        upsample_factor=(1,), scaling_factor=1.5,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.tensor([-0.7, 0.1, 0.3, -0.2]))
    vae.latents_std.copy_(torch.tensor([2.8, 1.4, 2.3, 0.9]))
    return vae


def audio_vae() -> Any:
    """LTX-2's VAE of sound in its smallest shape: 2 channels of 2 mel bins to a token."""
    from diffusers import AutoencoderKLLTX2Audio

    vae = AutoencoderKLLTX2Audio(
        base_channels=CHANNELS, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=16, latent_channels=2, mel_bins=8
    )
    vae.latents_mean.copy_(torch.tensor([0.4, -0.3, 0.2, -0.1]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.8, 1.2, 2.1]))
    return vae

"""Tiny pipelines of the LTX models."""

from __future__ import annotations

from typing import Any

import torch

from tests.euphonium.generators.tiny_parts import TEXT, flow_scheduler, t5_encoder, t5_tokenizer


def ltx() -> Any:
    """LTX-Video 0.9.0, with the entries of the published scheduler."""
    from diffusers import LTXPipeline

    return LTXPipeline(**ltx_parts())


def ltx_timestep_conditioned() -> Any:
    """LTX-Video 0.9.1, whose decoder takes a time."""
    from diffusers import LTXPipeline

    return LTXPipeline(**ltx_parts(timestep_conditioning=True))


def ltx_parts(**of_vae: Any) -> dict[str, Any]:
    """What the pipelines of LTX-Video share."""
    from diffusers import LTXVideoTransformer3DModel

    tokenizer = t5_tokenizer()
    return {
        "scheduler": flow_scheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, base_shift=0.95, max_shift=2.05,
            shift_terminal=0.1,
        ),
        "vae": ltx_vae(**of_vae),
        "text_encoder": t5_encoder(len(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=3, caption_channels=TEXT,
        ),
    }  # fmt: skip


def ltx_vae(**options: Any) -> Any:
    """LTX's VAE in its smallest shape: 2 frames and 8 pixels a side to a latent."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,), down_block_types=("LTXVideoDownBlock3D",),
        decoder_block_out_channels=(8,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        upsample_residual=(False,), upsample_factor=(1,), scaling_factor=1.5, **options,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.tensor([-0.7, 0.1, 0.3, -0.2]))
    vae.latents_std.copy_(torch.tensor([2.8, 1.4, 2.3, 0.9]))
    return vae

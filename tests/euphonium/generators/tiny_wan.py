"""Tiny pipelines of the Wan models."""

from __future__ import annotations

from typing import Any

from tests.euphonium.generators.tiny_parts import TEXT, t5_tokenizer


def text_parts() -> dict[str, Any]:
    """Tokenizer, UMT5 encoder and scheduler."""
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    t5 = t5_tokenizer()
    return {
        "tokenizer": t5,
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=len(t5), d_model=TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=2)
        ),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def wan_vae(**changes: Any) -> Any:
    """Wan 2.1's VAE: 2 frames and 2 pixels a side to a latent."""
    from diffusers import AutoencoderKLWan

    options = {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True],
        "latents_mean": [-0.7, 0.1, 0.3, -0.2], "latents_std": [2.8, 1.4, 2.3, 0.9], "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    }  # fmt: skip
    return AutoencoderKLWan(**(options | changes))


def wan_transformer(**changes: Any) -> Any:
    """Wan's transformer with three blocks."""
    from diffusers import WanTransformer3DModel

    options = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**(options | changes))


def wan() -> Any:
    """Wan 2.1."""
    from diffusers import WanPipeline

    return WanPipeline(**text_parts(), vae=wan_vae(), transformer=wan_transformer())


def wan_22() -> Any:
    """Wan 2.2 TI2V: a time for every token, and a VAE with shortcuts that reads squares of pixels."""
    from diffusers import WanPipeline

    vae = wan_vae(
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=8, scale_factor_spatial=4
    )
    return WanPipeline(**text_parts(), vae=vae, transformer=wan_transformer(), expand_timesteps=True)


def wan_experts() -> Any:
    """Wan 2.2 A14B: one transformer for high noise, one for low."""
    from diffusers import WanPipeline

    return WanPipeline(
        **text_parts(), vae=wan_vae(), transformer=wan_transformer(), transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )  # fmt: skip


def wan_image_to_video_experts() -> Any:
    """Wan 2.2 I2V A14B."""
    from diffusers import WanImageToVideoPipeline

    experts = {name: wan_transformer(in_channels=10) for name in ("transformer", "transformer_2")}
    return WanImageToVideoPipeline(**text_parts(), **experts, vae=wan_vae(), boundary_ratio=0.9)


def wan_image_to_video() -> Any:
    """Wan 2.1 I2V, with CLIP's view of pictures of 28 x 28 pixels."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    return WanImageToVideoPipeline(
        **text_parts(),
        vae=wan_vae(),
        transformer=wan_transformer(in_channels=10, image_dim=16, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(clip),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )

"""Parts ``vae`` and ``attention15`` of gpu_suite.py: decoding, and the attention of HunyuanVideo-1.5."""

from __future__ import annotations

import torch
from gpu_suite_tools import Record, attention, generator_of, release, setup_of, timed
from guided_step_networks import Setup, family_of, made_on
from torch import Tensor

from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.vae import VideoVae

SMALL_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}

# HunyuanVideo-1.5, 81 frames at 480x848: 33,390 tokens of the clip, 1000 of the text. Four of its 54 blocks.
CLIP_15 = Setup(
    kind="HunyuanVideo15", transformer={"num_layers": 4}, spatial=16,
    model={"dtype": "bfloat16", "frames": 81, "height": 480, "width": 848, "max_prompt_tokens": 1000},
)  # fmt: skip
TINY_15 = Setup(
    kind="HunyuanVideo15", spatial=16,
    transformer={
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_refiner_layers": 1,
        "text_embed_dim": 32, "text_embed_2_dim": 16, "image_embed_dim": 16, "rope_axes_dim": [4, 6, 6],
    },
    model={"dtype": "bfloat16", "frames": 9, "height": 64, "width": 64, "max_prompt_tokens": 8},
)  # fmt: skip
GLYPH_TOKENS = 16


@torch.no_grad()
def vae(record: Record) -> None:
    """Decoding of clips by HunyuanVideo's VAE, with and without its memory savers."""
    from diffusers import AutoencoderKLHunyuanVideo

    device = record.device
    with made_on(device, torch.bfloat16):
        network = AutoencoderKLHunyuanVideo(**(SMALL_VAE if record.small else {})).eval()
    with family_of(setup_of(record)) as family:
        shape = family.latent_shape
    coder = VideoVae(network, device, torch.bfloat16)
    latents = torch.randn(2, *shape, device=device)

    def decode(name: str, batch: int) -> None:
        record.measure(name, lambda: timed(lambda: coder.decode(latents[:batch]), device, repeats=2))
        release(device)

    decode("decode, 1 clip", 1)
    coder.saving_memory(tiling=True, slicing=False)
    decode("decode, 1 clip, tiling", 1)
    network.disable_tiling()
    decode("decode, 2 clips", 2)
    coder.saving_memory(tiling=False, slicing=True)
    decode("decode, 2 clips, slicing", 2)


def conditioning_15(family: Generator, device: torch.device) -> Conditioning:
    """Random embeddings of a prompt of full length, and of the glyphs in it."""
    config = family.transformer_config()
    found: Conditioning = {}
    for suffix, tokens in (("", family.config.max_prompt_tokens), ("_2", GLYPH_TOKENS)):
        width = int(config[f"text_embed{suffix}_dim"])
        found[f"encoder_hidden_states{suffix}"] = torch.randn(1, tokens, width, device=device, dtype=family.dtype)
        found[f"encoder_attention_mask{suffix}"] = torch.ones(1, tokens, device=device, dtype=family.dtype)
    return found


class Unmasked:
    """HunyuanVideo-1.5's attention without a mask, nor the work of making one."""

    def __init__(self) -> None:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        self._attention = HunyuanVideoAttnProcessor2_0()

    def __call__(
        self, attn: torch.nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The processors of both models differ in the mask alone."""
        out: tuple[Tensor, Tensor] = self._attention(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
        return out


@torch.no_grad()
def attention15(record: Record) -> None:
    """A few blocks of HunyuanVideo-1.5, whose attention makes a mask of all pairs of tokens, and without it."""
    device = record.device
    setup = TINY_15 if record.small else CLIP_15
    with family_of(setup) as family:
        transformer = generator_of(family, device)
        conditioning = conditioning_15(family, device)
        x = torch.randn(1, *family.latent_shape, device=device)
        times = torch.full((1,), 0.5, device=device)
        blocks = list(transformer.get_submodule("transformer_blocks").children())
        outputs: list[Tensor] = []

        def work() -> None:
            outputs[:] = [family.velocity(transformer, x, times, conditioning)]

        def measure(name: str) -> Tensor | None:
            values = record.measure(name, lambda: timed(work, device) | {"blocks": len(blocks)})
            release(device)
            return outputs[0] if values else None

        built = measure("velocity as built")
        with attention("none"):
            measure("velocity, mask built and dropped")
        for block in blocks:
            block.attn.set_processor(Unmasked())
        without = measure("velocity without mask")
        if built is not None and without is not None:
            difference = float((built - without).norm() / built.norm())
            record.measure("what the mask changes", lambda: {"relative_difference": difference})

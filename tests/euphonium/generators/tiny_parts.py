"""Text encoders, tokenizers, VAEs and schedulers that tiny pipelines share: real classes, random weights."""

from __future__ import annotations

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

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

"""Tiny pipelines of the Qwen-Image models."""

from __future__ import annotations

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from tests.euphonium.generators.tiny_parts import TEXT, flow_scheduler, image_vae

CONVERSATION = "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"


def qwen_tokenizer(words: list[str], **options: Any) -> Any:
    """Qwen's tokenizer, of single bytes and some whole words."""
    from transformers import Qwen2Tokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *words]})
    return tokenizer


def qwen_config(tokenizer: Any, layers: int) -> Any:
    """Configuration of Qwen3."""
    from transformers import Qwen3Config

    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=TEXT, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def qwen_vision_text(tokenizer: Any) -> Any:
    """Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    end, image = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|image_pad|>"])
    text = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT, "intermediate_size": TEXT, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": None,
        "eos_token_id": end, "pad_token_id": end,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT,
        "patch_size": 2, "window_size": 8, "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image)
    )


def z_image() -> Any:
    """Z-Image."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    tokenizer = qwen_tokenizer(["user", "assistant"])
    tokenizer.chat_template = CONVERSATION
    return ZImagePipeline(
        scheduler=flow_scheduler(shift=3.0),
        vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(qwen_config(tokenizer, layers=3)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
            axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
        ),
    )  # fmt: skip


def qwen_image() -> Any:
    """Qwen-Image, with the entries of the published scheduler."""
    from diffusers import QwenImagePipeline

    # The pipeline drops the first 34 tokens, which are its instruction's in the published tokenizer.
    instruction = (
        "the image by detailing color, shape, size, texture, quantity, text, spatial relationships of objects and"
    )
    words = ["Describe the", *(f" {word}" for word in instruction.split()), " background:"]
    return QwenImagePipeline(**qwen_parts(qwen_tokenizer([*words, "<|image_pad|>"])))


def qwen_parts(tokenizer: Any) -> dict[str, Any]:
    """What the pipelines of Qwen-Image share."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    return {
        "scheduler": flow_scheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, max_shift=0.9, shift_terminal=0.02
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[-0.7, 0.1, 0.3, -0.2], latents_std=[2.8, 1.4, 2.3, 0.9],
        ),
        "text_encoder": qwen_vision_text(tokenizer),
        "tokenizer": tokenizer,
        "transformer": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6),
        ),
    }  # fmt: skip


def qwen_image_edit() -> Any:
    """Qwen-Image-Edit."""
    from diffusers import QwenImageEditPipeline

    return edit_pipeline(QwenImageEditPipeline)


def qwen_image_edit_plus() -> Any:
    """Qwen-Image-Edit 2509."""
    from diffusers import QwenImageEditPlusPipeline

    return edit_pipeline(QwenImageEditPlusPipeline)


def edit_pipeline(kind: Any) -> Any:
    """A pipeline whose text encoder reads pictures, as squares of 4 pixels a side."""
    from transformers import Qwen2VLImageProcessor

    from euphonium.generators.processors import without_torchvision

    # The pipelines drop the first 64 tokens, which are their instruction's in the published tokenizer: 8 of the
    # conversation, and here one of its text and 55 letters.
    instruction = kind(*(None,) * 6).prompt_template_encode.partition("<|im_end|>")[0].partition("\n")[2]
    words = ["system", "user", instruction[:-55], "Picture 1: "]
    tokenizer = qwen_tokenizer([*words, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    reader = Qwen2VLImageProcessor(patch_size=2, merge_size=2, size={"shortest_edge": 16, "longest_edge": 1024})
    pipeline = kind(**qwen_parts(tokenizer), processor=without_torchvision("Qwen2VLProcessor")(reader, tokenizer))
    pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))
    return pipeline

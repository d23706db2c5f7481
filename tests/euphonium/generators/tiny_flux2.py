"""Tiny pipelines of the FLUX.2 models."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from tests.euphonium.generators.tiny_parts import TEXT, flow_scheduler
from tests.euphonium.generators.tiny_qwen import CONVERSATION, qwen_config, qwen_tokenizer

# Mistral's, whose contents are lists.
TEMPLATE = (
    "<s>[SYSTEM_PROMPT]{{ messages[0].content[0].text }}[/SYSTEM_PROMPT][INST]{{ messages[-1].content[0].text }}[/INST]"
)


def flux2_vae() -> Any:
    """FLUX.2's VAE: pixels to latents of half the size, 4 channels."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return vae


def flux2_transformer(*, guidance_embeds: bool) -> Any:
    """FLUX.2's transformer, one block of both streams and two of one."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * TEXT, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip


def mistral_tokenizer() -> Any:
    """Mistral's tokenizer, of single bytes; the whole message of the system is a word."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    marks = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    whole.add_special_tokens({"additional_special_tokens": [*marks, SYSTEM_MESSAGE]})
    whole.chat_template = TEMPLATE
    return whole


def mistral(tokenizer: Any) -> Any:
    """Mistral Small 3 with the layers whose states are read."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": TEXT, "intermediate_size": TEXT,
        "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=1))


def flux2_dev() -> Any:
    """FLUX.2 dev, with the scale of guidance as an input."""
    from diffusers import Flux2Pipeline

    tokenizer = mistral_tokenizer()
    pipeline = Flux2Pipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=mistral(tokenizer),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
    )
    # Of the published folder's processor texts need the tokenizer alone.
    pipeline.register_to_config(tokenizer=("transformers", "PixtralProcessor"))
    return pipeline


def flux2_klein() -> Any:
    """FLUX.2 klein before it was distilled; its text encoder has the layers whose states are read."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer(["user", "assistant"])
    tokenizer.chat_template = CONVERSATION
    return Flux2KleinPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(qwen_config(tokenizer, layers=28)),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=False),
    )

"""An InternVL of the real classes with random weights, small enough for a test."""

from pathlib import Path

import torch

WORDS = (
    "a red blue car cat moving left right up down on white black background Frame1 Frame2 : The prompt of this video "
    "Quality"
)


def build_backbone(folder: Path, *, tied: bool = True) -> Path:
    """Writes model and tokenizer; frames are 28x28 pixels and take one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )

    special = ["<unk>", "<img>", "<IMG_CONTEXT>", "</img>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS.split())])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        ),
        image_token_id=vocabulary["<IMG_CONTEXT>"], image_seq_length=1, downsample_ratio=0.5, tie_word_embeddings=tied,
    )  # fmt: skip
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    return folder

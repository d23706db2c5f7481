"""An InternVL of the real classes with random weights, small enough for a test."""

import json
from pathlib import Path

import numpy as np
import torch

from euphonium.config import OrmConfig

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


def tiny_orm_recipe(folder: Path, optimizer: dict[str, object]) -> OrmConfig:
    """A recipe with a backbone and three pairs of videos, which are written into the folder."""
    build_backbone(folder / "backbone")
    rng, rows = np.random.default_rng(0), []
    for p, prompt in enumerate(["a red car", "a blue cat moving left", "a black cat"]):
        for sample, level in enumerate((60, 190)):
            noise = rng.integers(-30, 30, (3, 20, 24, 3))
            np.save(folder / f"{p}{sample}.npy", (level + noise).astype(np.uint8))
        rows.append({"prompt": prompt, "winner": f"{p}1.npy", "loser": f"{p}0.npy"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return OrmConfig(
        name="orm",
        output_dir=folder / "runs",
        target=folder / "orm",
        model={"path": str(folder / "backbone"), "frames": 2},
        preferences={"train": folder / "pairs.jsonl", "held_out_fraction": 0.34},
        optimizer=optimizer,
    )

"""Text side of the embedded generator: word tokenizers and tiny Llama and CLIP encoders.

The HunyuanVideo pipeline wraps every prompt in a long instruction and then drops its first 95 tokens, a number that
is fixed in diffusers. The tokenizer made here therefore spends exactly 95 tokens on that instruction, so that the
exported folder works with the pipeline's defaults.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from euphonium.embedded.sprites import all_scenes

if TYPE_CHECKING:
    from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

TEXT_DIM = 64
POOLED_DIM = 64
# Longest caption, its end-of-turn token and some room for other wordings.
MAX_PROMPT_TOKENS = 16

_TOKEN = re.compile(r"<\|\w+\|>|\w+|[^\w\s]")
_SPECIAL = ("<|pad|>", "<|unk|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def caption_words() -> list[str]:
    """Every word that captions use, sorted."""
    return sorted({word for scene in all_scenes() for word in scene.caption.split()})


def build_prompt_tokenizer() -> PreTrainedTokenizerFast:
    """The first tokenizer (Llama's place): knows the captions and the pipeline's instruction."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    prefix = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("{}")[0]
    tokens = _TOKEN.findall(prefix)
    missing = int(DEFAULT_PROMPT_TEMPLATE["crop_start"]) - 1 - len(tokens)
    known = caption_words()
    # A long word that the prefix holds once, spelled as two pieces, lengthens it by one token.
    pieces = [w for w in tokens if len(w) > 5 and w.isalpha() and tokens.count(w) == 1 and w not in known][:missing]
    if missing != len(pieces):
        raise ValueError("the pipeline's prompt template has changed; its prefix cannot be made to fit crop_start")
    whole = [t.lower() for t in tokens if t not in _SPECIAL and t not in pieces] + known
    halves = [half for w in pieces for half in (w[:3].lower(), "##" + w[3:].lower())]
    return _tokenizer([*whole, *halves], bos="<|begin_of_text|>", eos="<|eot_id|>", closes=False)


def build_pooled_tokenizer() -> PreTrainedTokenizerFast:
    """The second tokenizer (CLIP's place): knows the captions, closes them with its end token."""
    return _tokenizer(caption_words(), bos="<|begin_of_text|>", eos="<|eot_id|>", closes=True)


def _tokenizer(words: list[str], bos: str, eos: str, closes: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary: dict[str, int] = {}
    for word in [*_SPECIAL, *words]:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if closes else f"{bos} $A",
        special_tokens=[(bos, vocabulary[bos]), (eos, vocabulary[eos])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<|pad|>", unk_token="<|unk|>",
        padding_side="right",
    )  # fmt: skip


def build_prompt_encoder(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """A tiny Llama; the pipeline reads the hidden states that enter its last two layers."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            **_vocabulary(tokenizer),
        )
    )


def build_pooled_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """A tiny CLIP text model, of which the pipeline uses the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=POOLED_DIM,
            intermediate_size=2 * POOLED_DIM,
            projection_dim=POOLED_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            **_vocabulary(tokenizer),
        )
    )


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """What an encoder's configuration says of its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }

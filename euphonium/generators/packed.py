"""Attention of samples that are packed behind each other in one sequence, each to itself.

A network whose passes know one prompt and one pair of noise levels gets a batch as one sequence: all layers but
attention compute token by token, so that packing changes nothing else. It is called once a batch, whatever the
samples are, because ranks of ZeRO-3, whose batches differ, must call its layers equally often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_minimax_h3 import (
    MiniMaxH3Attention,
    MiniMaxH3AttnProcessor,
    _apply_rotary_emb,
)
from torch import Tensor
from typing_extensions import override

from euphonium.generators.attention import Run


class Packing:
    """How the latest batch is packed; what attends must know it, and the network does not hand it on.

    Recomputation in a backward pass finds the packing of its own forward pass as long as that of no other batch comes
    between the two.
    """

    def __init__(self) -> None:
        self.texts: list[Run] = []
        self.samples: list[Run] = []

    def set(self, lengths: Sequence[int], tokens: int) -> None:
        """Notes a batch: the number of text tokens of each sample, and of all others, which are equally many."""
        groups = [(length, len(list(members))) for length, members in groupby(lengths)]
        self.texts = [Run(number, length) for length, number in groups]
        self.samples = [Run(number, length + tokens) for length, number in groups]


def parts(packed: Tensor, runs: Sequence[Run]) -> Iterator[Tensor]:
    """The samples of each run, ``[samples, tokens, ...]``, of a packed sequence ``[1, all tokens, ...]``."""
    if len(runs) == 1:
        # Without the number of tokens, which would have compiled blocks compiled anew for every length of prompts.
        yield packed.unflatten(1, (runs[0].samples, -1))[0]
        return
    sizes = [run.samples * run.tokens for run in runs]
    for part, run in zip(packed.split(sizes, dim=1), runs, strict=True):
        yield part.unflatten(1, (run.samples, run.tokens))[0]


class PackedAttention(MiniMaxH3AttnProcessor):
    """Attention of MiniMax-H3 in which every sample attends to its own tokens."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self._packing = packing

    @override
    def __call__(
        self,
        attn: MiniMaxH3Attention,
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends among tokens ``[1, all tokens, width]`` of texts, which have no positions, or of whole samples."""
        runs = self._packing.texts if rotary_emb is None else self._packing.samples
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query, key = (_apply_rotary_emb(heads, *rotary_emb) for heads in (query, key))
        attended = [
            dispatch_attention_fn(*part, backend=self._attention_backend).flatten(0, 1)
            for part in zip(*(parts(heads, runs) for heads in (query, key, value)), strict=True)
        ]
        output: Tensor = attn.to_out[0](torch.cat(attended).unsqueeze(0).flatten(2).type_as(query))
        return output

"""Attention without masks: every sample attends to its own prompt's tokens, cut where a mask would hide the rest.

The Hunyuan transformers of diffusers hand a mask to every attention. Any mask forbids flash attention, also one that is
all true, and HunyuanVideo-1.5 even builds one of tokens times tokens in every block. Masks here only hide the padding
of prompts that share a pass with a longer one. The processor looks at a mask once a pass: samples with equally many
tokens attend together, apart from the others, so that none needs a mask. Layers are called once all the same, because
ranks of ZeRO-3, whose prompts differ, must call them equally often.

Where ranks share a sample's tokens (sequence.py), each has a part of the latents' tokens, and all of the prompt's.
Inside an attention it has a part of the heads, with all tokens; so prompts may have any number of tokens, and padding.
"""

from __future__ import annotations

import weakref
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

try:
    from torch.distributed._functional_collectives import all_gather_single_autograd
except ImportError:
    # Its name before torch 2.13.
    from torch.distributed._functional_collectives import all_gather_tensor_autograd as all_gather_single_autograd


class Run(NamedTuple):
    """Consecutive samples of a batch whose prompts have equally many tokens.

    Attributes:
        samples: number of samples.
        tokens: tokens of the prompt that they attend to, which come before all that are masked.
    """

    samples: int
    tokens: int


class Runs:
    """Finds the runs of a mask; all blocks of a pass get the same tensor, so that it is looked at once."""

    def __init__(self) -> None:
        self._latest: weakref.ref[Tensor] | None = None
        self._answer: list[Run] | None = None

    def __call__(self, mask: Tensor, tokens: int) -> list[Run] | None:
        """The runs, in order; waits for the device at the first call with a mask.

        Args:
            mask: ``[batch, ...]``, other than 0 where a token is seen; its last ones are those of the prompt. On the
                meta device, where masks have no values, all are seen.
            tokens: tokens of the longest prompt.

        Returns:
            None for a mask that hides anything but the ends of prompts.
        """
        if self._latest is None or self._latest() is not mask:
            self._answer = [Run(len(mask), tokens)] if mask.is_meta else _runs(mask, tokens)
            self._latest = weakref.ref(mask)
        return self._answer


def _runs(mask: Tensor, tokens: int) -> list[Run] | None:
    seen = mask.reshape(len(mask), -1) != 0
    before = seen.shape[1] - tokens
    counts = seen[:, before:].sum(dim=1)
    expected = torch.arange(seen.shape[1], device=mask.device) < (before + counts).unsqueeze(1)
    lengths = torch.where((seen == expected).all(dim=1), counts, -1).tolist()
    if -1 in lengths:
        return None
    return [Run(len(list(members)), length) for length, members in groupby(lengths)]


class HunyuanAttention(HunyuanVideoAttnProcessor2_0):
    """The attention of HunyuanVideo and of HunyuanVideo-1.5, without masks; the latter's is a case of the former's."""

    def __init__(self, runs: Runs) -> None:
        super().__init__()
        self._runs = runs

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The outputs for the latents' tokens and the text's; those of masked tokens mean nothing."""
        latents, texts = hidden_states.shape[1], encoder_hidden_states.shape[1]
        queries, keys, values = _projected(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        group = _sharing(self._parallel_config)
        if group is not None:
            queries, keys, values = (_by_heads(part, latents, group) for part in (queries, keys, values))
            latents = queries.shape[1] - texts
        runs = self._runs(attention_mask, texts)
        if runs is None:
            seen = attention_mask.reshape(len(attention_mask), -1) != 0
            seen = functional.pad(seen, (latents + texts - seen.shape[1], 0), value=True)
            attended = self._attend(queries, keys, values, seen[:, None, None])
        elif runs == [Run(len(hidden_states), texts)]:
            attended = self._attend(queries, keys, values)
        else:
            sizes = [run.samples for run in runs]
            attended = torch.cat([
                functional.pad(
                    self._attend(*(part[:, : latents + run.tokens] for part in parts)),
                    (0, 0, 0, 0, 0, texts - run.tokens),
                )
                for run, *parts in zip(runs, queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True)
            ])  # fmt: skip
        if group is not None:
            attended = _by_tokens(attended, latents, group)
            latents = hidden_states.shape[1]
        dtype = queries.dtype
        # In inference nothing else holds them.
        del queries, keys, values
        output, text = attended.flatten(2, 3).to(dtype).split([latents, texts], dim=1)
        if getattr(attn, "to_out", None) is not None:
            output = attn.to_out[1](attn.to_out[0](output))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return output, text

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        attended: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=None
        )
        return attended


def _sharing(config: Any) -> dist.ProcessGroup | None:
    """The ranks that share a sample's tokens; None if a rank has them all."""
    if config is None:
        return None
    group: dist.ProcessGroup = config.context_parallel_config._ulysses_mesh.get_group()
    return group


def _by_heads(tokens: Tensor, latents: int, group: dist.ProcessGroup) -> Tensor:
    """A rank's heads of all tokens, made of all heads of its latents' tokens and of the text's."""
    own, text = tokens[:, :latents], tokens[:, latents:]
    heads = text.chunk(dist.get_world_size(group), dim=2)[dist.get_rank(group)]
    return torch.cat([SeqAllToAllDim.apply(group, own, 2, 1), heads], dim=1)


def _by_tokens(attended: Tensor, latents: int, group: dist.ProcessGroup) -> Tensor:
    """The inverse of :func:`_by_heads`; ``latents`` counts those of all ranks."""
    own = SeqAllToAllDim.apply(group, attended[:, :latents], 1, 2)
    # The backward pass adds up the gradients of all ranks, in float32.
    text = all_gather_single_autograd(attended[:, latents:].float().contiguous(), 2, group)
    return torch.cat([own, text.to(attended.dtype)], dim=1)


def _projected(
    attn: Any, latents: Tensor, texts: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[batch, latent and text tokens, heads, width]``; only latents have positions."""
    count = latents.shape[1]
    own_text = attn.add_q_proj is not None
    tokens = latents if own_text else torch.cat([latents, texts], dim=1)
    query, key = _heads(attn, attn.to_q, attn.norm_q, tokens), _heads(attn, attn.to_k, attn.norm_k, tokens)
    value = _heads(attn, attn.to_v, None, tokens)
    # One after another, each in the place of what it was made of: the large tensors of a pass are these.
    if rotary is not None:
        query = _turned(query, count, rotary)
        key = _turned(key, count, rotary)
    if own_text:
        query = torch.cat([query, _heads(attn, attn.add_q_proj, attn.norm_added_q, texts)], dim=1)
        key = torch.cat([key, _heads(attn, attn.add_k_proj, attn.norm_added_k, texts)], dim=1)
        value = torch.cat([value, _heads(attn, attn.add_v_proj, None, texts)], dim=1)
    return query, key, value


def _turned(tokens: Tensor, count: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens with their positions, which the first ``count`` of them have."""
    if tokens.shape[1] == count:
        turned: Tensor = apply_rotary_emb(tokens, rotary, sequence_dim=1)
        return turned
    return torch.cat([apply_rotary_emb(tokens[:, :count], rotary, sequence_dim=1), tokens[:, count:]], dim=1)


def _heads(attn: Any, projection: nn.Module, norm: nn.Module | None, tokens: Tensor) -> Tensor:
    heads: Tensor = projection(tokens).unflatten(2, (attn.heads, -1))
    return heads if norm is None else norm(heads)


def leave_out_masks(transformer: nn.Module) -> None:
    """Gives the blocks of a Hunyuan transformer processors that attend without masks."""
    runs = Runs()
    for module in transformer.modules():
        if type(getattr(module, "processor", None)) in (HunyuanVideoAttnProcessor2_0, HunyuanVideo15AttnProcessor2_0):
            module.set_processor(HunyuanAttention(runs))  # type: ignore[operator]

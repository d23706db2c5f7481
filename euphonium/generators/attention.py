"""Attention without a mask where nothing is masked.

The Hunyuan transformers of diffusers hand a mask to every attention, also when all of it is true, which is the rule
here: a group has one prompt, whose conditioning is cut to its length. Any mask forbids flash attention, and
HunyuanVideo-1.5 even builds one of tokens times tokens in every block. The processors here look at a mask once a pass
and leave out one that hides nothing.
"""

from __future__ import annotations

import weakref

from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn


class HidesNothing:
    """Tells whether a mask is all true; all blocks of a pass get the same tensor, so that it is looked at once."""

    def __init__(self) -> None:
        self._latest: weakref.ref[Tensor] | None = None
        self._answer = False

    def __call__(self, mask: Tensor) -> bool:
        """Waits for the device at the first call with a mask; on the meta device, where masks have no values, true."""
        if self._latest is None or self._latest() is not mask:
            self._answer = mask.is_meta or bool((mask != 0).all())
            self._latest = weakref.ref(mask)
        return self._answer


class HunyuanAttention(HunyuanVideoAttnProcessor2_0):
    """HunyuanVideo's attention, without masks that hide nothing."""

    def __init__(self, hides_nothing: HidesNothing) -> None:
        super().__init__()
        self._hides_nothing = hides_nothing

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The outputs for the latents' tokens and the text's."""
        if attention_mask is not None and self._hides_nothing(attention_mask):
            attention_mask = None
        outputs: tuple[Tensor, Tensor] = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return outputs


class Hunyuan15Attention(HunyuanVideo15AttnProcessor2_0):
    """HunyuanVideo-1.5's attention, without masks that hide nothing."""

    def __init__(self, hides_nothing: HidesNothing) -> None:
        super().__init__()
        self._hides_nothing = hides_nothing

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The outputs for the latents' tokens and the text's."""
        attend = HunyuanVideo15AttnProcessor2_0.__call__
        if attention_mask is not None and self._hides_nothing(attention_mask):
            # Its own processor cannot do without a mask; that of HunyuanVideo computes the same from the same layers.
            attend, attention_mask = HunyuanVideoAttnProcessor2_0.__call__, None
        outputs: tuple[Tensor, Tensor] = attend(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return outputs


def leave_out_full_masks(transformer: nn.Module) -> None:
    """Gives the blocks of a Hunyuan transformer processors that leave out masks that hide nothing."""
    ours = {HunyuanVideoAttnProcessor2_0: HunyuanAttention, HunyuanVideo15AttnProcessor2_0: Hunyuan15Attention}
    hides_nothing = HidesNothing()
    for module in transformer.modules():
        kind = ours.get(type(getattr(module, "processor", None)))
        if kind is not None:
            module.set_processor(kind(hides_nothing))  # type: ignore[operator]

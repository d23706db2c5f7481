"""What a network reads besides state and time: encoded prompts and, where prompts come with pictures, encoded pictures.

A conditioning is a dictionary of tensors whose first dimension is the batch. Prompt encoders make it; the functions
here add to it, split it and batch it; only a generator's ``network`` knows what its entries mean.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Batch-first tensors that a transformer takes besides state and time; the names are its keyword arguments.
Conditioning = dict[str, Tensor]
PromptEncoder = Callable[[Sequence[str]], Conditioning]
# Entries that the pictures in some files add, such as their latents (:data:`IMAGE`).
ImageEncoder = Callable[[Sequence[Path]], Conditioning]

# Name of the entry with the latents of the picture, ``[batch, channels, frames, height, width]``.
IMAGE = "image_latents"
# Host memory of a rollout actor for encoded prompts: a thousand of the largest (HunyuanVideo-1.5, 7 MB).
CACHE_BYTES = 8 << 30
# Prefix of the negative prompt's entries.
NEGATIVE = "negative."


def positive(conditioning: Conditioning) -> Conditioning:
    """The entries of the prompt itself, without those of the negative prompt."""
    return {name: tensor for name, tensor in conditioning.items() if not name.startswith(NEGATIVE)}


def negative(conditioning: Conditioning) -> Conditioning:
    """The negative prompt's entries, by the names that the network knows."""
    return {n.removeprefix(NEGATIVE): tensor for n, tensor in conditioning.items() if n.startswith(NEGATIVE)}


def cast(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """The conditioning with all floating entries in one type; others, such as positions, stay as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in conditioning.items()}


def padded_texts(texts: Sequence[Tensor], dtype: torch.dtype) -> Conditioning:
    """The conditioning of texts ``[tokens, width]`` of any lengths, behind whose tokens a mask hides the padding."""
    seen = [text.new_ones(len(text)) for text in texts]
    entries = {"encoder_hidden_states": texts, "encoder_attention_mask": seen}
    return {name: pad_sequence(list(parts), batch_first=True).to(dtype) for name, parts in entries.items()}


def seen_texts(conditioning: Conditioning) -> list[Tensor]:
    """The texts of :func:`padded_texts`; waits for the device. On the meta device all have the greatest length.

    >>> texts = [torch.ones(length, 1) for length in (301, 2)]
    >>> [len(text) for text in seen_texts(padded_texts(texts, torch.bfloat16))]
    [301, 2]
    """
    texts, mask = conditioning["encoder_hidden_states"], conditioning["encoder_attention_mask"]
    # Counted as whole numbers: a sum in bfloat16 is exact up to 256 alone.
    lengths = [mask.shape[1]] * len(mask) if mask.is_meta else (mask != 0).sum(dim=1).tolist()
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: ``u + scale (c - u)`` of a network's two outputs, of any one shape."""
    return unconditional + scale * (conditional - unconditional)


def with_negative_prompt(encode: PromptEncoder, prompt: str) -> PromptEncoder:
    """An encoder that adds the entries of a negative prompt, which is encoded here, once."""
    entries = encode([prompt])

    def complete(prompts: Sequence[str]) -> Conditioning:
        repeated = expand(entries, len(prompts))
        return encode(prompts) | {NEGATIVE + name: tensor for name, tensor in repeated.items()}

    return complete


def with_pictures(encode: PromptEncoder, encode_images: ImageEncoder, image_of: Callable[[str], Path]) -> PromptEncoder:
    """An encoder that adds the entries of pictures, the same ones to the negative prompt's.

    Args:
        encode: encodes texts, with the negative prompt if there is one.
        encode_images: encodes pictures.
        image_of: returns a prompt's picture; whatever it raises, the encoder raises.
    """

    def complete(prompts: Sequence[str]) -> Conditioning:
        whole = encode(prompts)
        guides = len(positive(whole)) < len(whole)
        images = encode_images([image_of(prompt) for prompt in prompts])
        if guides:
            images = images | {NEGATIVE + name: tensor for name, tensor in images.items()}
        return whole | images

    return complete


class ConditioningCache:
    """Conditionings by prompt, in host memory, of which those that were not used for longest make room for others.

    Args:
        encode: encodes one prompt.
        max_bytes: bytes that may be held, besides the latest conditioning.
    """

    def __init__(self, encode: Callable[[str], Conditioning], max_bytes: int) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def of(self, prompt: str) -> Conditioning:
        """The prompt's conditioning, on the CPU; encoded if it is not held."""
        if prompt not in self._held:
            self._held[prompt] = {name: tensor.cpu() for name, tensor in self._encode(prompt).items()}
            self._bytes += _nbytes(self._held[prompt])
        self._held.move_to_end(prompt)
        while self._bytes > self._max_bytes and len(self._held) > 1:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= _nbytes(dropped)
        return self._held[prompt]


def _nbytes(conditioning: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in conditioning.values())


def expand(conditioning: Conditioning, batch: int) -> Conditioning:
    """Repeats the conditioning of one prompt for a batch, without copying.

    >>> one = {"pooled_projections": torch.tensor([[1.0, 2.0]])}
    >>> expand(one, 3)["pooled_projections"].tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    """
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in conditioning.items()}


# Ends of the names of a prompt's tokens and of their mask, which both go on with the number of the encoder.
_TOKENS, _MASK = "hidden_states", "attention_mask"


def stack_conditionings(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenates conditionings to one batch; shorter ones are padded with zeros, also in their masks.

    Raises:
        ValueError: conditionings of different lengths have no mask, so that padding would change what they say.

    >>> short, long = ({"encoder_attention_mask": torch.ones(1, length)} for length in (1, 3))
    >>> stack_conditionings([short, long])["encoder_attention_mask"].tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    stacked: Conditioning = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].dim() > 1:
            longest = max(t.shape[1] for t in tensors)
            masked = _TOKENS not in name or name.replace(_TOKENS, _MASK) in parts[0]
            if not masked and any(t.shape[1] != longest for t in tensors):
                raise ValueError(f"conditionings differ in the length of {name!r}, which has no mask to pad it under")
            tensors = [
                t if t.shape[1] == longest
                else torch.cat([t, t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:])], dim=1)
                for t in tensors
            ]  # fmt: skip
        stacked[name] = torch.cat(tensors)
    return stacked

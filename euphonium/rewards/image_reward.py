"""ImageReward (Xu et al., 2023): BLIP reads the prompt while it looks at the picture, and a head scores what it read.

The networks are transformers' BLIP classes; the published file has BLIP's own names, which are translated here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from euphonium.config.base import PathOrHubId
from euphonium.rewards.clip import FramePreparation
from euphonium.rewards.frames import check_videos, spread
from euphonium.rewards.pretrained import (
    Dtype,
    NetworkOptions,
    device_of,
    dtype_of,
    filled,
    hub_file,
    loading,
    pinned,
    read_weights,
)

# Of the published model: tokens of a prompt, and what its scores are centred and divided by.
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_WIDTH = 64
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SEEN, READ, SCORED = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
# Names of BLIP's picture encoder, and those of transformers'.
PICTURE_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class _Preparation(FramePreparation):
    """Shorter side to the network's size, the centre, CLIP's normalisation."""

    def __init__(self, side: int) -> None:
        self.shortest, self.exact, self.crop = side, None, (side, side)
        self.mean, self.std = PIXEL_MEAN, PIXEL_STD


class _Network(nn.Module):
    """Both encoders and the head, with the sizes that a state dictionary has."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        patches = state["vision.embeddings.patch_embedding.weight"]
        words = state["text.embeddings.word_embeddings.weight"]
        places = state["vision.embeddings.position_embedding"].shape[1] - 1
        width, side = patches.shape[0], patches.shape[-1]
        self.side = round(places**0.5) * side
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(state, "vision.encoder.layers."), num_attention_heads=width // HEAD_WIDTH,
                image_size=self.side, patch_size=side, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words.shape[0], hidden_size=words.shape[1], encoder_hidden_size=width,
                intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(state, "text.encoder.layer."),
                num_attention_heads=words.shape[1] // HEAD_WIDTH,
                max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=True,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        # Linear layers alone: the published head has no activations, and its dropouts are of training.
        numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("head.")})
        shapes = [state[f"head.{n}.weight"].shape for n in numbers]
        self.head = nn.ModuleDict({str(n): nn.Linear(s[1], s[0]) for n, s in zip(numbers, shapes, strict=True)})

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores ``[batch]`` of pictures with the tokens of their prompts."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state[:, 0]  # fmt: skip
        for layer in self.head.values():
            read = layer(read)
        return (read[:, 0].float() - MEAN) / STD


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the published file under the names of this network; what scores do not need is left out."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(SEEN):
            renamed = name.removeprefix(SEEN)
            for theirs, ours in PICTURE_NAMES:
                renamed = re.sub(theirs, ours, renamed)
            found[f"vision.{renamed}"] = tensor
        elif name.startswith(READ) and not name.endswith("position_ids"):
            found[f"text.{name.removeprefix(READ)}"] = tensor
        elif name.startswith(SCORED):
            found[f"head.{name.removeprefix(SCORED)}"] = tensor
    return found


class ImageReward:
    """People's preference between pictures of a prompt; about -2 to 2, unbounded."""

    class Options(NetworkOptions):
        """The published file, and how many frames it sees."""

        weights: PathOrHubId
        """File ``ImageReward.pt``: a path, or owner/name:file."""
        revision: str | None = None
        """Commit of the hub repository in ``weights``."""
        tokenizer: PathOrHubId
        """Folder or hub id of the tokenizer of ``bert-base-uncased``."""
        tokenizer_revision: str | None = None
        """Commit of the hub id in ``tokenizer``."""
        frames: PositiveInt = 8
        """Frames of a video that are scored, evenly spread, and averaged."""
        batch: PositiveInt = 32
        """Frames in one forward pass."""
        dtype: Dtype = "float32"
        """Type of the network's weights."""

    def __init__(self, options: Options) -> None:
        """Loads the networks.

        Raises:
            ConfigError: weights that are missing, not pinned or of another architecture; names the option.
        """
        self.options = options
        self._device = device_of(options.device)
        from transformers import AutoTokenizer

        source = pinned(options.tokenizer, options.tokenizer_revision, "tokenizer")
        with loading("tokenizer", options.tokenizer):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(**source)
        file = hub_file(options.weights, options.revision, "weights")
        state = {n: t.to(dtype_of(options.dtype)) for n, t in from_published(read_weights(file, "weights")).items()}
        network = filled(lambda: _Network(state), state, "weights", options.weights)
        self._network = network.to(self._device).eval().requires_grad_(False)
        self._prepare = _Preparation(network.side)

    @torch.inference_mode()
    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``: the mean over the chosen frames; prompts are cut to 35 tokens."""
        check_videos(videos, prompts)
        chosen = videos[:, spread(videos.shape[1], self.options.frames)]
        tokens = self._tokenizer(
            [str(prompt) for prompt in prompts], padding="max_length", truncation=True, max_length=TOKENS,
            return_tensors="pt",
        )  # fmt: skip
        count = chosen.shape[1]
        words, mask = (tokens[name].repeat_interleave(count, dim=0) for name in ("input_ids", "attention_mask"))
        dtype, parts = next(self._network.parameters()).dtype, []
        for begin in range(0, len(words), self.options.batch):
            part = slice(begin, begin + self.options.batch)
            pixels = self._prepare(chosen.flatten(0, 1)[part].to(self._device)).to(dtype)
            parts.append(self._network(pixels, words[part].to(self._device), mask[part].to(self._device)).cpu())
        return torch.cat(parts).view(len(videos), count).mean(dim=1)

"""Rewards on CLIP features of single frames: CLIP score, PickScore, HPS v2.1 and LAION's aesthetic predictor.

All four are transformers' CLIP classes. They differ in weights, in how a frame is brought to the network's size, and
in what is read off the features. Of a video, a few frames are scored and averaged.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from euphonium.config.base import PathOrHubId
from euphonium.errors import ConfigError
from euphonium.rewards.frames import check_videos, cropped, normalised, quantised, resized, spread
from euphonium.rewards.pretrained import (
    Dtype,
    PretrainedOptions,
    device_of,
    dtype_of,
    filled,
    hub_file,
    loading,
    pinned,
    read_weights,
    whole_network,
)

if TYPE_CHECKING:
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# Tokens that CLIP's text tower has positions for.
TEXT_TOKENS = 77


class FramePreparation:
    """CLIP's image processor in torch, with the settings of its ``preprocessor_config.json``."""

    def __init__(self, processor: CLIPImageProcessorPil) -> None:
        size = processor.size
        if not processor.do_resize or not processor.do_normalize or not processor.do_rescale:
            raise ValueError("a preprocessor that does not resize, rescale and normalise")
        self.shortest = size.get("shortest_edge")
        self.exact = None if self.shortest else (size["height"], size["width"])
        crop = processor.crop_size if processor.do_center_crop else None
        self.crop = (crop["height"], crop["width"]) if crop else None
        self.mean = tuple(processor.image_mean)
        self.std = tuple(processor.image_std)

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures ``[count, 3, h, w]`` in [0, 1] as the network takes them."""
        height, width = images.shape[-2:]
        if self.shortest:
            # The longer side is cut, not rounded, to whole pixels: Pillow-side processors do.
            short, long = min(height, width), max(height, width)
            longer = int(self.shortest * long / short)
            target = (self.shortest, longer) if height <= width else (longer, self.shortest)
        else:
            assert self.exact is not None
            target = self.exact
        pixels = resized(quantised(images), *target)
        if self.crop:
            pixels = cropped(pixels, *self.crop)
        return normalised(pixels, self.mean, self.std)


class LetterboxPreparation(FramePreparation):
    """Longer side to the network's size, black bars at the shorter one: what HPS v2 was trained on."""

    def __init__(self, processor: CLIPImageProcessorPil) -> None:
        super().__init__(processor)
        self.side = self.crop[0] if self.crop else self.shortest or (self.exact or (0, 0))[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures ``[count, 3, h, w]`` in [0, 1] as the network takes them."""
        height, width = images.shape[-2:]
        scale = self.side / max(height, width)
        height, width = round(height * scale), round(width * scale)
        # Its own pipeline resizes floating-point pictures, hence no rounding to levels here.
        pixels = resized(quantised(images), height, width, levels=False)
        above, left = (self.side - height) // 2, (self.side - width) // 2
        bars = (left, self.side - width - left, above, self.side - height - above)
        return normalised(functional.pad(pixels, bars), self.mean, self.std)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of an OpenCLIP ViT checkpoint as transformers' ``CLIPModel`` has them.

    OpenCLIP keeps queries, keys and values in one matrix, and its two projections transposed.
    """
    towers = (("visual.", "vision_model."), ("", "text_model."))
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    for kind in ("weight", "bias"):
        names[f"visual.ln_pre.{kind}"] = f"vision_model.pre_layrnorm.{kind}"
        names[f"visual.ln_post.{kind}"] = f"vision_model.post_layernorm.{kind}"
        names[f"ln_final.{kind}"] = f"text_model.final_layer_norm.{kind}"
    parts = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "visual.proj":
            result["visual_projection.weight"] = tensor.T.contiguous()
        elif name == "text_projection":
            result["text_projection.weight"] = tensor.T.contiguous()
        elif name in names:
            result[names[name]] = tensor
        elif ".resblocks." in f".{name}":
            theirs, ours = towers[0] if name.startswith("visual.") else towers[1]
            layer, _, rest = name.removeprefix(f"{theirs}transformer.resblocks.").partition(".")
            prefix = f"{ours}encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{prefix}self_attn.{part}_proj.{kind}"] = piece.contiguous()
            else:
                part, _, kind = rest.rpartition(".")
                result[f"{prefix}{parts.get(part, part)}.{kind}"] = tensor
        elif name != "attn_mask":
            result[name] = tensor
    return result


class _ClipReward(ABC):
    """Network, tokenizer and preparation of a frame; subclasses say what is read off the features."""

    class Options(PretrainedOptions):
        """Which network, and how many frames it sees."""

        weights: PathOrHubId
        """Folder of a CLIP in transformers' layout, with tokenizer and preprocessor, or a hub id with ``revision``."""
        frames: PositiveInt = 8
        """Frames of a video that are scored, evenly spread, and averaged."""
        batch: PositiveInt = 32
        """Frames in one forward pass."""
        dtype: Dtype = "float32"
        """Type of the network's weights."""
        trust_remote_code: bool = False
        """Let Python code that comes with the weights run; no published CLIP needs it."""
        checkpoint: PathOrHubId | None = None
        """File with OpenCLIP weights that replace those of ``weights``; a path, or owner/name:file."""
        checkpoint_revision: str | None = None
        """Commit of the hub repository in ``checkpoint``."""

    preparation: ClassVar[type[FramePreparation]] = FramePreparation

    def __init__(self, options: Options) -> None:
        """Loads the network.

        Raises:
            ConfigError: weights that are missing, not pinned or of another architecture; names the option.
        """
        self.options = options
        self.device = device_of(options.device)
        source = pinned(options.weights, options.revision)
        from transformers import AutoTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        with loading("weights", options.weights):
            self._prepare = type(self).preparation(CLIPImageProcessorPil.from_pretrained(**source))
            self._tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=options.trust_remote_code)
        self.network = _network(options).to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors, float32 ``[count, width]``, of pictures ``[count, 3, h, w]`` in [0, 1]."""
        parts = []
        for part in images.split(self.options.batch):
            pixels = self._prepare(part.to(self.device)).to(next(self.network.parameters()).dtype)
            found = self.network.get_image_features(pixel_values=pixels)
            parts.append(functional.normalize(found.pooler_output.float(), dim=1))
        return torch.cat(parts)

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 ``[prompts, width]``; prompts are cut to 77 tokens."""
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        )
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        found = self.network.get_text_features(**inputs)
        return functional.normalize(found.pooler_output.float(), dim=1)

    def _width(self) -> int:
        """Length of the feature vectors."""
        projection = self.network.get_parameter("visual_projection.weight")
        return int(projection.shape[0])

    @abstractmethod
    def _read(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``[batch, frames]`` of unit vectors ``[batch, frames, width]``."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``: the mean over the chosen frames."""
        check_videos(videos, prompts)
        chosen = videos[:, spread(videos.shape[1], self.options.frames)]
        features = self.image_features(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
        return self._read(features, prompts).mean(dim=1).float().cpu()

    def _cosine(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.einsum("bfw,bw->bf", features, self.text_features(prompts))


class ClipScore(_ClipReward):
    """Cosine between picture and prompt (Radford et al., 2021), in [-1, 1]; good pictures have about 0.3."""

    @override
    def _read(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._cosine(features, prompts)


class PickScore(_ClipReward):
    """Cosine times the learned scale, as PickScore publishes it (Kirstain et al., 2023); about 18 to 24.

    The scale is at most 100, so the range is [-100, 100].
    """

    @override
    def _read(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._cosine(features, prompts) * self.network.logit_scale.exp().float()


class HpsV21(_ClipReward):
    """Human Preference Score v2.1 (Wu et al., 2023): a cosine, in [-1, 1]; about 0.2 to 0.38."""

    preparation = LetterboxPreparation

    @override
    def _read(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._cosine(features, prompts)


class AestheticReward(_ClipReward):
    """LAION's predictor of human ratings from 1 to 10 on CLIP image features; the prompts do not matter.

    The head is read off its file: one linear layer (predictor v1), or a chain of linear layers without activations in
    between (the "linear MSE" heads of v2). Its output is not clipped, so it can leave the scale a little.
    """

    class Options(_ClipReward.Options):
        """The options of every CLIP reward, and the head."""

        weights: PathOrHubId
        """The CLIP that the head was trained on (ViT-L/14 for the published ones): a folder, or a hub id."""
        head: PathOrHubId
        """File of the head, ``.safetensors`` or ``.pth``: a path, or owner/name:file."""
        head_revision: str | None = None
        """Commit of the hub repository in ``head``."""

    def __init__(self, options: Options) -> None:
        """Loads features and head.

        Raises:
            ConfigError: the head cannot be read or does not fit the features.
        """
        state = read_weights(hub_file(options.head, options.head_revision, "head"), "head")
        self.head_layers = _linear_chain(state, options.head)
        super().__init__(options)
        width, taken = self._width(), self.head_layers[0][0].shape[1]
        if taken != width:
            raise ConfigError(
                f"option head: {options.head!r} takes {taken} features, the CLIP of {options.weights!r} gives {width}"
            )
        self.head_layers = [(w.float().to(self.device), b.float().to(self.device)) for w, b in self.head_layers]

    @override
    def _read(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        for weight, bias in self.head_layers:
            features = functional.linear(features, weight, bias)
        return features.squeeze(-1)


def _network(options: _ClipReward.Options) -> CLIPModel:
    """The network on the CPU, with the weights that count."""
    from transformers import AutoConfig, AutoModel

    source, trusted = pinned(options.weights, options.revision), {"trust_remote_code": options.trust_remote_code}
    dtype = dtype_of(options.dtype)
    with loading("weights", options.weights):
        if options.checkpoint is None:
            network = whole_network(AutoModel, **source, **trusted, dtype=dtype)
        else:
            file = hub_file(options.checkpoint, options.checkpoint_revision, "checkpoint")
            state = from_open_clip(read_weights(file, "checkpoint"))
            config = AutoConfig.from_pretrained(**source, **trusted)
            weights = {name: part.to(dtype) for name, part in state.items()}
            network = filled(
                lambda: AutoModel.from_config(config, **trusted), weights, "checkpoint", options.checkpoint
            )
    if not hasattr(network, "get_image_features") or not hasattr(network, "get_text_features"):
        kind = type(network).__name__
        raise ConfigError(f"option weights: {options.weights!r} is {kind}, not a CLIP with two towers")
    return network


def _linear_chain(state: dict[str, Tensor], source: str) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of linear layers in the order of their numbers.

    Raises:
        ConfigError: something else than linear layers that follow on each other down to one output.
    """
    names = sorted(
        {name.rpartition(".")[0] for name in state}, key=lambda name: [int(n) for n in name.split(".") if n.isdigit()]
    )
    try:
        layers = [(state[f"{name}.weight".lstrip(".")], state[f"{name}.bias".lstrip(".")]) for name in names]
        widths = [layer[0].shape[1] for layer in layers[1:]] + [1]
        fits = all(weight.shape[0] == width == len(bias) for (weight, bias), width in zip(layers, widths, strict=True))
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"option head: {source!r} holds no linear layers: {sorted(state)[:6]}") from error
    if not layers or not fits or not math.isfinite(sum(float(w.sum()) for w, _ in layers)):
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        raise ConfigError(f"option head: layers of {source!r} do not follow on each other to one output: {shapes}")
    return layers

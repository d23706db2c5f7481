"""VideoAlign's checkpoint: Qwen2-VL with low-rank adapters and a head, as its authors save it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from euphonium.errors import ConfigError
from euphonium.rewards.pretrained import Dtype, dtype_of, filled, loading, pinned, read_weights

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen2VLConfig

ASPECTS = ("VQ", "MQ", "TA")
SPECIAL_TOKENS = tuple(f"<|{aspect}_reward|>" for aspect in ASPECTS)
# Mean and standard deviation of the published checkpoint, for copies whose model_config.json lost them.
PUBLISHED_NORM = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """Where a checkpoint is, and where and in which type it computes.

    Attributes:
        weights: folder or hub id of the checkpoint.
        revision: commit of the hub id.
        base: folder or hub id of the Qwen2-VL that it was trained from; only its configuration files are read.
        base_revision: commit of the hub id in ``base``.
        dtype: type of the network's weights.
        device: device of the network.
    """

    weights: str
    revision: str | None
    base: str
    base_revision: str | None
    dtype: Dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """Network, tokenizer and settings of one checkpoint.

    Attributes:
        network: the network, frozen and in evaluation mode.
        tokenizer: the checkpoint's own tokenizer, which pads on the right.
        special: ids of the tokens at which VQ, MQ and TA are read.
        mean: mean of each channel of the pixels, for normalisation.
        std: standard deviation of each channel.
        norm: mean and deviation of each aspect's scores over the authors' data.
        fps: frames a second that the network was trained on.
        most_pixels: largest number of pixels of a frame.
    """

    network: VideoRewardNetwork
    tokenizer: Qwen2Tokenizer
    special: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: dict[str, tuple[float, float]]
    fps: float
    most_pixels: int


class VideoRewardNetwork(nn.Module):
    """Qwen2-VL without its word head, and a linear head without bias."""

    def __init__(self, config: Qwen2VLConfig, outputs: int) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.backbone = Qwen2VLModel(config)
        self.rm_head = nn.Linear(config.text_config.hidden_size, outputs, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor, special: Sequence[int]) -> Tensor:
        """Raw scores, float32 ``[batch, 3]``.

        Args:
            tokens: ``[batch, length]``, padded on the right.
            mask: ``[batch, length]``, 1 where ``tokens`` are not padding.
            pixels: patch vectors of all videos, one video after another.
            grids: ``[batch, 3]``, patches of each video along time, height and width.
            special: ids of the three tokens at which the scores are read.
        """
        # The authors' forward pass hands the language model no positions, which then counts 0, 1, 2, ...
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, len(tokens), -1)
        found = self.backbone(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            pixel_values_videos=pixels,
            video_grid_thw=grids,
            use_cache=False,
        )
        where = torch.stack([(tokens == token).int().argmax(dim=1) for token in special], dim=1)
        hidden = found.last_hidden_state[torch.arange(len(tokens), device=tokens.device)[:, None], where]
        scores = self.rm_head(hidden).float()
        # One output is shared by the three tokens; of three outputs each token has its own.
        return scores.squeeze(2) if scores.shape[2] == 1 else scores.diagonal(dim1=1, dim2=2)


def merged_state(state: Mapping[str, Tensor], rank: int, alpha: float, root_scaling: bool) -> dict[str, Tensor]:
    """A checkpoint of a PEFT-wrapped Qwen2-VL as the plain network's, its low-rank adapters added to the weights.

    Names become those of transformers' ``Qwen2VLModel`` (``visual.``, ``language_model.``) plus ``rm_head``.
    """
    scale = alpha / (math.sqrt(rank) if root_scaling else rank)
    plain: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix("base_model.model.")
        if ".lora_" in name:
            layer, _, rest = name.partition(".lora_")
            adapters.setdefault(layer, {})[rest[0]] = tensor
        else:
            plain[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    for layer, parts in adapters.items():
        weight = plain[f"{layer}.weight"]
        added = scale * (parts["B"].float() @ parts["A"].float())
        plain[f"{layer}.weight"] = (weight.float() + added).to(weight.dtype)
    result: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if name.startswith("lm_head.") or ".original_module." in name:
            continue
        if name.startswith("model.visual."):
            name = name.removeprefix("model.")
        elif name.startswith("model.") and not name.startswith("model.language_model."):
            name = f"language_model.{name.removeprefix('model.')}"
        result[name.removeprefix("model.")] = tensor
    return result


# Rewards that differ in their rubric or frame rate are different analysers, and still share the weights.
@lru_cache(maxsize=2)
def load_checkpoint(source: CheckpointSource) -> LoadedCheckpoint:
    """Loads a checkpoint, once a process.

    Raises:
        ConfigError: a file is missing, not pinned, or of another model; names the option.
    """
    folder = _folder(source.weights, source.revision)
    with loading("weights", source.weights):
        settings = json.loads((folder / "model_config.json").read_text(encoding="utf-8"))
        file = _newest_weights(folder, source.weights)
        state = _state(file, settings.get("peft_lora_config") or {})

    from transformers import Qwen2Tokenizer, Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    base = pinned(source.base, source.base_revision, "base")
    with loading("base", source.base):
        config = Qwen2VLConfig.from_pretrained(**base)
        processor = Qwen2VLImageProcessorPil.from_pretrained(**base)
    with loading("weights", source.weights):
        tokenizer = Qwen2Tokenizer.from_pretrained(file.parent / "tokenizer", padding_side="right")
    network = _network(config, state, source)
    with loading("weights", source.weights):
        data = settings.get("data_config") or {}
        return LoadedCheckpoint(
            network=network.to(source.device).eval().requires_grad_(False),
            tokenizer=tokenizer,
            special=_special_tokens(tokenizer, source.weights),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            norm=_norm(settings.get("inference_config") or {}),
            fps=float(data.get("fps") or 2.0),
            most_pixels=int(data.get("max_frame_pixels") or 448 * 448),
        )


def _folder(weights: str, revision: str | None) -> Path:
    """The checkpoint's folder, fetched from the hub if need be."""
    source = pinned(weights, revision)
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    with loading("weights", weights):
        return Path(snapshot_download(weights, revision=source["revision"]))


def _newest_weights(folder: Path, weights: str) -> Path:
    """File with the weights in the checkpoint of the latest step."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for step in steps[-1:]:
        for name in ("model.safetensors", "model.pth"):
            if (step / name).is_file():
                return step / name
    raise ConfigError(
        f"option weights: {weights!r} holds no checkpoint-*/model.pth or model.safetensors; download or copy it again"
    )


def _state(file: Path, lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the plain network, the adapters merged."""
    state = merged_state(
        read_weights(file, "weights"),
        int(lora.get("lora_r", 1)),
        float(lora.get("lora_alpha", 1)),
        bool(lora.get("use_rslora", False)),
    )
    if "rm_head.weight" not in state or "language_model.embed_tokens.weight" not in state:
        raise ConfigError(
            f"option weights: {str(file)!r} is no VideoReward checkpoint: no rm_head or embed_tokens; download "
            "or copy it again"
        )
    return state


def _network(config: Qwen2VLConfig, state: Mapping[str, Tensor], source: CheckpointSource) -> VideoRewardNetwork:
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    # "auto" would pick flash attention's own numbers where it is installed.
    config._attn_implementation = "sdpa"
    named = {name if name == "rm_head.weight" else f"backbone.{name}": tensor for name, tensor in state.items()}
    dtype = dtype_of(source.dtype)
    weights = {name: tensor.to(dtype) for name, tensor in named.items()}
    together = f"{source.weights} with the configuration of {source.base}"
    return filled(lambda: VideoRewardNetwork(config, len(state["rm_head.weight"])), weights, "weights", together)


def _special_tokens(tokenizer: Qwen2Tokenizer, weights: str) -> tuple[int, ...]:
    special = tuple(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    if tokenizer.chat_template is None or None in special or len({*special, tokenizer.unk_token_id}) != 4:
        raise ConfigError(
            f"option weights: the tokenizer of {weights!r} lacks its chat template or reward tokens; download or "
            "copy it again"
        )
    return special


def _norm(calibration: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean and deviation of each aspect's scores."""
    return {
        aspect: (float(calibration.get(f"{aspect}_mean", mean)), float(calibration.get(f"{aspect}_std", std)))
        for aspect, (mean, std) in PUBLISHED_NORM.items()
    }

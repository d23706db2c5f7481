"""VideoAlign's VideoReward (Liu et al., 2025): Qwen2-VL with heads for visual quality, motion and text alignment.

One network reads the video and a rubric that holds the prompt; the three scores are read at three special tokens of
the rubric. What its published numbers depend on is kept: frames at two a second of the *video's* time, the frame size,
the rubric's wording, one-dimensional positions (its network never used Qwen2-VL's three-dimensional ones), and the
mean and deviation of each score over its authors' data.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from euphonium.errors import ConfigError
from euphonium.rewards.frames import check_videos, normalised, quantised, resized
from euphonium.rewards.pretrained import device_of, dtype_of, fill, loading, pinned, read_weights

ASPECTS = ("VQ", "MQ", "TA")
SPECIAL_TOKENS = tuple(f"<|{aspect}_reward|>" for aspect in ASPECTS)
VIDEO_TOKEN = "<|video_pad|>"
# Mean and standard deviation of the published checkpoint, for copies whose model_config.json lost them.
PUBLISHED_NORM = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
PROMPT_PLACE = "{text_prompt}"
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
LEAST_PIXELS = 128 * 28 * 28
LEAST_FRAMES, MOST_FRAMES, FRAME_FACTOR = 4, 768, 2


def read_template(path: str) -> str:
    """The rubric: a text file, or VideoAlign's ``prompt_template.py``, of which one constant is read and nothing run.

    Raises:
        ConfigError: no such file, or no rubric with the place of the prompt and the three tokens in it.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"option template: no file {path!r}; give prompt_template.py of https://github.com/KwaiVGI/VideoAlign, "
            "whose wording the published weights were trained with, or a text file of your own"
        )
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        constants = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        text = str(constants.get(TEMPLATE_NAME, ""))
    wrong = [part for part in (*SPECIAL_TOKENS, PROMPT_PLACE) if text.count(part) != 1]
    if wrong:
        raise ConfigError(f"option template: {path!r} must hold each of {', '.join(wrong)} exactly once")
    return text


def sampled_frames(frames: int, video_fps: float, sample_fps: float) -> list[int]:
    """Indices of the frames that the network sees: ``sample_fps`` a second, an even number, four at least.

    Args:
        frames: of the video, 2 or more.
        video_fps: frames a second at which the video plays.
        sample_fps: frames a second that are looked at.
    """
    most = min(MOST_FRAMES, frames) // FRAME_FACTOR * FRAME_FACTOR
    wanted = min(max(frames / video_fps * sample_fps, LEAST_FRAMES), most)
    count = min(round(wanted / FRAME_FACTOR) * FRAME_FACTOR, frames)
    return torch.linspace(0, frames - 1, count).round().long().tolist()


def frame_size(height: int, width: int, factor: int, most_pixels: int) -> tuple[int, int]:
    """Size that keeps the aspect ratio, in multiples of ``factor``, within the bounds on a frame's pixels."""
    tall, wide = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if tall * wide > most_pixels:
        shrink = math.sqrt(height * width / most_pixels) * factor
        return math.floor(height / shrink) * factor, math.floor(width / shrink) * factor
    if tall * wide < LEAST_PIXELS:
        grow = math.sqrt(LEAST_PIXELS / (height * width)) / factor
        return math.ceil(height * grow) * factor, math.ceil(width * grow) * factor
    return tall, wide


def patches(video: Tensor, patch: int, temporal: int, merge: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Qwen2-VL's patch vectors, in the order in which its vision tower merges them.

    Args:
        video: ``[frames, 3, height, width]``, normalised; frames a multiple of ``temporal``.
        patch: pixels of a patch's side.
        temporal: frames of a patch.
        merge: patches of a merged token's side.

    Returns:
        ``[patches, 3 * temporal * patch * patch]``, and their grid (time, height, width).
    """
    frames, channels, height, width = video.shape
    time, rows, columns = frames // temporal, height // patch, width // patch
    blocks = video.reshape(
        time, temporal, channels, rows // merge, merge, patch, columns // merge, merge, patch
    ).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(time * rows * columns, -1), (time, rows, columns)


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


class VideoRewardNetwork(nn.Module):
    """Qwen2-VL without its word head, and a linear head without bias."""

    def __init__(self, config: Any, outputs: int) -> None:
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


@dataclass(frozen=True)
class _Loaded:
    """Network, tokenizer and settings of one checkpoint."""

    network: VideoRewardNetwork
    tokenizer: Any
    special: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: dict[str, tuple[float, float]]
    fps: float
    most_pixels: int


def _folder(weights: str, revision: str | None) -> Path:
    """The checkpoint's folder, fetched from the hub if need be."""
    source = pinned(weights, revision)
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    with loading("weights", weights):
        return Path(snapshot_download(weights, revision=source["revision"]))


@lru_cache(maxsize=2)
def _load(
    weights: str, revision: str | None, base: str, base_revision: str | None, dtype: str, device: torch.device
) -> _Loaded:
    """Loads once a process: three rewards that read one aspect each share the network."""
    folder = _folder(weights, revision)
    with loading("weights", weights):
        settings = json.loads((folder / "model_config.json").read_text(encoding="utf-8"))
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    held = [
        step / name for step in steps[-1:] for name in ("model.safetensors", "model.pth") if (step / name).is_file()
    ]
    if not held:
        raise ConfigError(f"option weights: {weights!r} holds no checkpoint-*/model.pth or model.safetensors")
    lora = settings.get("peft_lora_config") or {}
    state = merged_state(
        read_weights(held[0], "weights"),
        int(lora.get("lora_r", 1)),
        float(lora.get("lora_alpha", 1)),
        bool(lora.get("use_rslora", False)),
    )
    if "rm_head.weight" not in state or "language_model.embed_tokens.weight" not in state:
        raise ConfigError(f"option weights: {str(held[0])!r} is no VideoReward checkpoint: no rm_head or embed_tokens")

    from transformers import Qwen2Tokenizer, Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    source = pinned(base, base_revision, "base")
    with loading("base", base):
        config = Qwen2VLConfig.from_pretrained(**source)
        processor = Qwen2VLImageProcessorPil.from_pretrained(**source)
    with loading("weights", weights):
        tokenizer = Qwen2Tokenizer.from_pretrained(held[0].parent / "tokenizer", padding_side="right")
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    # "auto" would pick flash attention's own numbers where it is installed.
    config._attn_implementation = "sdpa"
    network = VideoRewardNetwork(config, len(state["rm_head.weight"]))
    named = {name if name == "rm_head.weight" else f"backbone.{name}": tensor for name, tensor in state.items()}
    fill(network, {name: tensor.to(dtype_of(dtype)) for name, tensor in named.items()}, "weights", weights)

    special = tuple(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    if tokenizer.chat_template is None or None in special or len({*special, tokenizer.unk_token_id}) != 4:
        raise ConfigError(f"option weights: the tokenizer of {weights!r} lacks its chat template or reward tokens")
    calibration = settings.get("inference_config") or {}
    data = settings.get("data_config") or {}
    return _Loaded(
        network=network.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        special=special,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        norm={
            aspect: (float(calibration.get(f"{aspect}_mean", mean)), float(calibration.get(f"{aspect}_std", std)))
            for aspect, (mean, std) in PUBLISHED_NORM.items()
        },
        fps=float(data.get("fps") or 2.0),
        most_pixels=int(data.get("max_frame_pixels") or 448 * 448),
    )


class _Memo:
    """Raw scores of the latest batch: three rewards of one server score the same tensor one after another."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.held: tuple[Tensor, Tensor] | None = None


_memo = _Memo()


class VideoAlignReward:
    """Weighted sum of the chosen aspects, each normalised to the authors' mean and deviation.

    Unbounded; mostly within -3 to 3 an aspect.
    """

    def __init__(
        self,
        weights: str,
        base: str,
        template: str,
        video_fps: float,
        revision: str | None = None,
        base_revision: str | None = None,
        aspects: Mapping[str, float] | None = None,
        normalise: bool = True,
        sample_fps: float | None = None,
        max_frame_pixels: int | None = None,
        batch: int = 1,
        dtype: str = "bfloat16",
        device: str | None = None,
    ) -> None:
        """Loads the network, once for all rewards of the process with the same weights.

        Args:
            weights: folder or hub id of the checkpoint (KwaiVGI/VideoReward).
            base: folder or hub id of Qwen2-VL-2B-Instruct; only its configuration files are read.
            template: VideoAlign's prompt_template.py, or a text file with a rubric of your own.
            video_fps: frames a second at which the generated videos play. A wrong value shifts all scores.
            revision: commit of the hub id in ``weights``.
            base_revision: commit of the hub id in ``base``.
            aspects: weight of each of VQ, MQ and TA; those left out are not counted. All three count 1 unless given.
            normalise: subtract the mean and divide by the deviation of the authors' data.
            sample_fps: frames a second that are looked at; the checkpoint's own unless given.
            max_frame_pixels: larger frames are scaled down; the checkpoint's own unless given.
            batch: videos in one forward pass.
            dtype: float32, bfloat16 (as published) or float16.
            device: such as ``cuda:0``; the GPU, if there is one, unless given.

        Raises:
            ConfigError: a file is missing, not pinned, or of another model; names the option.
            ValueError: an option out of range.
        """
        chosen = dict(aspects) if aspects is not None else dict.fromkeys(ASPECTS, 1.0)
        if not chosen or not set(chosen) <= set(ASPECTS):
            raise ValueError(f"aspects must be some of {', '.join(ASPECTS)} with their weights, got {chosen}")
        if video_fps <= 0 or batch < 1 or (sample_fps is not None and sample_fps <= 0):
            raise ValueError("video_fps and sample_fps must be positive, and batch at least 1")
        self.template = read_template(template)
        self.loaded = _load(weights, revision, base, base_revision, dtype, device_of(device))
        self.aspects = {name: float(weight) for name, weight in chosen.items()}
        self.video_fps = video_fps
        self.normalise = normalise
        self.sample_fps = sample_fps or self.loaded.fps
        self.most_pixels = max_frame_pixels or self.loaded.most_pixels
        self.batch = batch

    def text(self, prompt: str, video_tokens: int) -> str:
        """The conversation that the network reads, as one string.

        Raises:
            ValueError: a prompt that holds one of the tokens that mean something here.
        """
        if any(token in prompt for token in (*SPECIAL_TOKENS, VIDEO_TOKEN)):
            raise ValueError(f"a prompt must not contain the reward model's own tokens, got {prompt!r}")
        rubric = self.template.replace(PROMPT_PLACE, prompt)
        content = [{"type": "video"}, {"type": "text", "text": rubric}]
        conversation = self.loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return str(conversation).replace(VIDEO_TOKEN, VIDEO_TOKEN * video_tokens, 1)

    def pixels(self, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Patch vectors and grid of one video ``[frames, 3, height, width]`` in [0, 1]."""
        vision = self.loaded.network.backbone.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        size = frame_size(video.shape[-2], video.shape[-1], factor, self.most_pixels)
        chosen = sampled_frames(len(video), self.video_fps, self.sample_fps)
        frames = normalised(resized(quantised(video[chosen]), *size), self.loaded.mean, self.loaded.std)
        return patches(frames, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)

    @torch.inference_mode()
    def raw(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores before normalisation, float32 ``[batch, 3]`` in the order VQ, MQ, TA."""
        network = self.loaded.network
        device, dtype = network.rm_head.weight.device, network.rm_head.weight.dtype
        merged = network.backbone.config.vision_config.spatial_merge_size**2
        parts = []
        for begin in range(0, len(videos), self.batch):
            some = [self.pixels(video.to(device)) for video in videos[begin : begin + self.batch]]
            texts = [
                self.text(prompt, math.prod(grid) // merged)
                for prompt, (_, grid) in zip(prompts[begin : begin + self.batch], some, strict=True)
            ]
            tokens = self.loaded.tokenizer(texts, padding=True, return_tensors="pt").to(device)
            parts.append(
                network(
                    tokens["input_ids"],
                    tokens["attention_mask"],
                    torch.cat([pixels for pixels, _ in some]).to(dtype),
                    torch.tensor([grid for _, grid in some], device=device),
                    self.loaded.special,
                ).cpu()
            )
        return torch.cat(parts)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """See :class:`euphonium.rewards.base.OutcomeReward`; unbounded.

        Raises:
            ValueError: videos of one frame, or a prompt with the network's own tokens in it.
        """
        check_videos(videos, prompts, least_frames=FRAME_FACTOR)
        key = (
            id(videos), videos._version, tuple(prompts), id(self.loaded), self.template,
            self.video_fps, self.sample_fps, self.most_pixels,
        )  # fmt: skip
        if _memo.held is None or _memo.key != key:
            _memo.key, _memo.held = key, (videos, self.raw(videos, prompts))
        raw = _memo.held[1]
        total = torch.zeros(len(videos))
        for aspect, weight in self.aspects.items():
            values = raw[:, ASPECTS.index(aspect)]
            mean, std = self.loaded.norm[aspect] if self.normalise else (0.0, 1.0)
            total += weight * (values - mean) / std
        return total

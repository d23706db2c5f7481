"""Outcome reward model: a vision-language model (InternVL) with a scalar head on its last token (Euphonium, 5.1).

It sees evenly spaced frames of a video, then its prompt. A saved model is a folder with ``config.json`` (how a video
becomes tokens), the tokenizer, the backbone in ``backbone/`` and ``head.safetensors`` (``weight`` [1, width] and
``bias`` [1]). As a reward its type is ``trained``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from euphonium.config import BackboneConfig
from euphonium.config.base import UserPath
from euphonium.errors import ConfigError
from euphonium.rewards.frames import check_videos
from euphonium.rewards.pretrained import NetworkOptions, device_of, whole_network
from euphonium.weight_files import one_line

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
HEAD_FILE = "head.safetensors"
BACKBONE_FOLDER = "backbone"
# What InternVL's images are normalised with; a preprocessor_config.json beside the weights overrides it.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """How a video and its prompt become inputs of the network.

    Attributes:
        frames: number of frames that the network sees, evenly spaced; shorter videos repeat some.
        size: side of a frame in pixels.
        tokens_per_frame: image tokens a frame.
        mean: mean of each channel of the pixels, for normalisation.
        std: standard deviation of each channel.
        image_tokens: ids of the tokens that begin, fill and end a frame; without the first and last if null.
        max_prompt_tokens: prompts are cut to this many.
        before: text before each frame; ``{number}`` counts from 1.
        question: text after the frames; ``{prompt}`` is not replaced but inserted as tokens where this text ends.
        ending: text after the prompt; the head reads the last token of it.
    """

    frames: int
    size: int
    tokens_per_frame: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_tokens: tuple[int | None, int, int | None]
    max_prompt_tokens: int
    before: str = "Frame{number}: "
    question: str = "\nThe prompt of this video: "
    ending: str = "\nQuality:"


class OutcomeModel(nn.Module):
    """Backbone and head; rewards are unbounded, higher is better."""

    def __init__(
        self,
        backbone: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        video: VideoFormat,
        dtype: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.format = video
        self.dtype = getattr(torch, dtype)
        width = int(backbone.config.text_config.hidden_size)
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_backbone(cls, config: BackboneConfig, device_map: str | None = None) -> OutcomeModel:
        """A model whose backbone starts from pretrained weights, in float32, and whose head is fresh.

        Args:
            config: which backbone.
            device_map: ``meta`` reads no weights, only their files' headers; None loads them.

        Raises:
            ConfigError: the backbone cannot be loaded, or is of a kind that does not fit.
        """
        from transformers import AutoConfig, AutoTokenizer, InternVLForConditionalGeneration

        source: dict[str, str | None] = {"pretrained_model_name_or_path": config.path, "revision": config.revision}
        try:
            kind = AutoConfig.from_pretrained(**source).model_type
            if kind != "internvl":
                raise ConfigError(
                    f"model.path: {config.path} is a {kind} model; this needs an InternVL in transformers' own layout, "
                    "for example OpenGVLab/InternVL3-1B-hf"
                )
            backbone = whole_network(
                InternVLForConditionalGeneration, **source, dtype=torch.float32, device_map=device_map
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except ConfigError:
            raise
        except Exception as error:  # transformers raises what it happens to stumble over in a damaged file
            raise ConfigError(
                f"model.path: cannot load {config.path}: {one_line(error)}; download or copy it again"
            ) from error
        mean, std = _normalisation(Path(config.path))
        size = backbone.config.vision_config.image_size
        ids = [tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{end}_image_token", None) or default)
               for end, default in (("start", "<img>"), ("end", "</img>"))]  # fmt: skip
        known = [None if i == tokenizer.unk_token_id else i for i in ids]
        video = VideoFormat(
            frames=config.frames,
            size=int(size[0] if isinstance(size, (list, tuple)) else size),
            tokens_per_frame=int(backbone.config.image_seq_length),
            mean=mean,
            std=std,
            image_tokens=(known[0], int(backbone.config.image_token_id), known[1]),
            max_prompt_tokens=config.max_prompt_tokens,
        )
        return cls(backbone, tokenizer, video, config.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Rewards ``[batch]``, float32.

        Args:
            input_ids: int64 ``[batch, length]``, padded behind.
            attention_mask: int64 ``[batch, length]``.
            pixel_values: float32 ``[batch * frames, 3, size, size]``, normalised.
        """
        with self._computing(input_ids.device):
            hidden = self.backbone.model(
                input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
            ).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(dim=1) - 1]
        rewards: Tensor = self.head(last.float())
        return rewards.squeeze(1)

    def _computing(self, device: torch.device) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def frames_of(self, video: Tensor) -> Tensor:
        """The frames that are seen, uint8 ``[frames, 3, size, size]``, of a video ``[any, 3, height, width]``.

        Args:
            video: uint8, or float in [0, 1].
        """
        count, size = self.format.frames, self.format.size
        chosen = torch.linspace(0, len(video) - 1, count) if count > 1 else torch.tensor([(len(video) - 1) / 2])
        frames = video[chosen.round().long().to(video.device)]
        frames = frames.float() if video.dtype == torch.uint8 else frames.float() * 255
        if frames.shape[-2:] != (size, size):
            frames = functional.interpolate(frames, (size, size), mode="bicubic", antialias=True)
        return frames.round().clamp(0, 255).to(torch.uint8)

    def inputs(self, frames: Sequence[Tensor], prompts: Sequence[str], device: torch.device) -> Inputs:
        """Inputs of :meth:`forward` for a batch.

        Args:
            frames: results of :meth:`frames_of`, one tensor a video.
            prompts: one a video.
            device: device that the inputs are put on.

        Raises:
            ValueError: a prompt that holds an image token.
        """
        rows = [self._tokens(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        pixels = torch.cat(list(frames)).to(device).float() / 255
        shape = (1, 3, 1, 1)
        mean, std = pixels.new_tensor(self.format.mean).view(shape), pixels.new_tensor(self.format.std).view(shape)
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "pixel_values": (pixels - mean) / std,
        }

    def _tokens(self, prompt: str) -> list[int]:
        begin, fill, end = self.format.image_tokens

        def encoded(text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

        words = encoded(prompt)[: self.format.max_prompt_tokens]
        if fill in words:
            raise ValueError(f"a prompt must not contain the reward model's own tokens, got {prompt!r}")
        tokens: list[int] = []
        for number in range(1, self.format.frames + 1):
            tokens += encoded(self.format.before.format(number=number))
            tokens += [] if begin is None else [begin]
            tokens += [fill] * self.format.tokens_per_frame
            tokens += [] if end is None else [end]
        return tokens + encoded(self.format.question) + words + encoded(self.format.ending)

    def save(self, folder: Path, **notes: object) -> None:
        """Writes the model as a folder; ``notes`` go into its ``config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder / BACKBONE_FOLDER)
        self.tokenizer.save_pretrained(folder)
        head = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(head, folder / HEAD_FILE)
        description = {
            "backbone": BACKBONE_FOLDER,
            "head": HEAD_FILE,
            "pooling": "last_token",
            "dtype": str(self.dtype).removeprefix("torch."),
            "video": asdict(self.format),
            **notes,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> OutcomeModel:
        """Reads a saved model, frozen and in evaluation mode.

        Raises:
            ConfigError: the folder holds none, or files that do not fit each other.
        """
        from transformers import AutoTokenizer, InternVLForConditionalGeneration

        try:
            description = json.loads((folder / CONFIG_FILE).read_text())
            values = description["video"]
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            source = {"pretrained_model_name_or_path": folder / description["backbone"], "local_files_only": True}
            backbone = whole_network(InternVLForConditionalGeneration, **source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = cls(backbone, tokenizer, VideoFormat(**(values | lists)), description["dtype"])
            model.head.load_state_dict(load_file(folder / description["head"]))
        except Exception as error:  # transformers raises what it happens to stumble over in a damaged file
            raise ConfigError(
                f"{folder} holds no outcome reward model of train-orm: {one_line(error)}; copy it again "
                "from where it was written"
            ) from error
        return model.eval().requires_grad_(False)


class TrainedOutcomeReward:
    """A trained outcome reward model as a reward; unbounded, and only differences mean something."""

    class Options(NetworkOptions):
        """Which model."""

        path: UserPath
        """Folder that ``euphonium train-orm`` wrote."""
        batch: PositiveInt = 4
        """Videos in one forward pass."""

    def __init__(self, options: Options) -> None:
        """Loads the model.

        Raises:
            ConfigError: the folder holds no such model.
        """
        self.device = device_of(options.device)
        self.model = OutcomeModel.load(options.path).to(self.device)
        self.batch = options.batch

    @torch.inference_mode()
    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``, unbounded."""
        check_videos(videos, prompts)
        parts = []
        for begin in range(0, len(videos), self.batch):
            part = slice(begin, begin + self.batch)
            frames = [self.model.frames_of(video) for video in videos[part]]
            parts.append(self.model(**self.model.inputs(frames, prompts[part], self.device)).cpu())
        return torch.cat(parts)


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for name in PREPROCESSOR_FILES:
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())
            if "image_mean" in found:
                return tuple(found["image_mean"]), tuple(found["image_std"])
    return IMAGE_MEAN, IMAGE_STD

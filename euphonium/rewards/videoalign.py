"""VideoAlign's VideoReward (Liu et al., 2025): Qwen2-VL with heads for visual quality, motion and text alignment.

One network reads the video and a rubric that holds the prompt; the three scores are read at three special tokens of
the rubric. What its published numbers depend on is kept: frames at two a second of the *video's* time, the frame size,
the rubric's wording, one-dimensional positions (its network never used Qwen2-VL's three-dimensional ones), and the
mean and deviation of each score over its authors' data.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from euphonium.config.base import PathOrHubId, UserPath
from euphonium.errors import ConfigError
from euphonium.rewards.frames import check_videos, normalised, quantised, resized
from euphonium.rewards.pretrained import PretrainedOptions, device_of
from euphonium.rewards.shared import Analyser, SharedReward
from euphonium.rewards.videoalign_checkpoint import ASPECTS, SPECIAL_TOKENS, CheckpointSource, load_checkpoint
from euphonium.text_files import read_text

VIDEO_TOKEN = "<|video_pad|>"
PROMPT_PLACE = "{text_prompt}"
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
LEAST_PIXELS = 128 * 28 * 28
LEAST_FRAMES, MOST_FRAMES, FRAME_FACTOR = 4, 768, 2


def read_template(file: Path) -> str:
    """The rubric: a text file, or VideoAlign's ``prompt_template.py``, of which one constant is read and nothing run.

    Raises:
        ConfigError: no such file, or no rubric with the place of the prompt and the three tokens in it.
    """
    if not file.is_file():
        raise ConfigError(
            f"option template: no file {str(file)!r}; give prompt_template.py of "
            "https://github.com/KwaiVGI/VideoAlign, whose wording the published weights were trained with, or a text "
            "file of your own"
        )
    text = read_text(file, "option template")
    if file.suffix == ".py":
        text = _python_constant(text, file)
    wrong = [part for part in (*SPECIAL_TOKENS, PROMPT_PLACE) if text.count(part) != 1]
    if wrong:
        raise ConfigError(f"option template: {str(file)!r} must hold each of {', '.join(wrong)} exactly once")
    return text


def _python_constant(code: str, file: Path) -> str:
    """The rubric among the constants of a Python file, empty if it is not there."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"option template: {str(file)!r} is no readable Python: {why}; download it again, or give a text file"
        ) from error
    constants = {
        target.id: node.value.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return str(constants.get(TEMPLATE_NAME, ""))


def sampled_frames(frames: int, video_fps: float, sample_fps: float) -> list[int]:
    """Indices of the frames that the network sees: ``sample_fps`` a second, an even number, four at least.

    Args:
        frames: number of frames of the video, 2 or more.
        video_fps: frames a second at which the video plays.
        sample_fps: frames a second that are looked at.
    """
    most = min(MOST_FRAMES, frames) // FRAME_FACTOR * FRAME_FACTOR
    wanted = min(max(frames / video_fps * sample_fps, LEAST_FRAMES), most)
    count = min(round(wanted / FRAME_FACTOR) * FRAME_FACTOR, frames)
    return torch.linspace(0, frames - 1, count).round().long().tolist()


def frame_size(
    height: int, width: int, factor: int, most_pixels: int, least_pixels: int = LEAST_PIXELS
) -> tuple[int, int]:
    """Size that keeps the aspect ratio, in multiples of ``factor``, within the bounds on a frame's pixels."""
    tall, wide = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if tall * wide > most_pixels:
        shrink = math.sqrt(height * width / most_pixels) * factor
        return math.floor(height / shrink) * factor, math.floor(width / shrink) * factor
    if tall * wide < least_pixels:
        grow = math.sqrt(least_pixels / (height * width)) / factor
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


class VideoAlignAnalyser(Analyser[Tensor]):
    """The network before one rubric; its analysis is the raw scores, float32 ``[batch, 3]`` in the order VQ, MQ, TA."""

    class Options(PretrainedOptions):
        """The checkpoint, and how it looks at a video."""

        weights: PathOrHubId
        """Folder or hub id of the checkpoint (KwaiVGI/VideoReward)."""
        base: PathOrHubId
        """Folder or hub id of Qwen2-VL-2B-Instruct; only its configuration files are read."""
        base_revision: str | None = None
        """Commit of the hub id in ``base``."""
        template: UserPath
        """VideoAlign's prompt_template.py, or a text file with a rubric of your own."""
        video_fps: PositiveFloat
        """Frames a second at which the generated videos play. A wrong value shifts all scores."""
        sample_fps: PositiveFloat | None = None
        """Frames a second that are looked at; null takes the checkpoint's own."""
        max_frame_pixels: PositiveInt | None = None
        """Larger frames are scaled down; null takes the checkpoint's own."""

    def __init__(self, options: Options) -> None:
        """Reads the rubric and loads the network.

        Raises:
            ConfigError: a file is missing, not pinned, or of another model; names the option.
        """
        self.template = read_template(options.template)
        self.loaded = load_checkpoint(
            CheckpointSource(
                weights=options.weights,
                revision=options.revision,
                base=options.base,
                base_revision=options.base_revision,
                dtype=options.dtype,
                device=device_of(options.device),
            )
        )
        self.video_fps = options.video_fps
        self.sample_fps = options.sample_fps or self.loaded.fps
        self.most_pixels = options.max_frame_pixels or self.loaded.most_pixels
        self.batch = options.batch

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
    def analyse(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores before normalisation, float32 ``[batch, 3]`` in the order VQ, MQ, TA.

        Raises:
            ValueError: videos of one frame, or a prompt with the network's own tokens in it.
        """
        check_videos(videos, prompts, least_frames=FRAME_FACTOR)
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


class VideoAlignReward(SharedReward[Tensor]):
    """Weighted sum of the chosen aspects, each normalised to the authors' mean and deviation.

    Unbounded; mostly within -3 to 3 an aspect. Rewards of a recipe that differ in ``aspects`` and ``normalise`` alone
    share the network and its forward pass.
    """

    analyser_class = VideoAlignAnalyser

    class Options(VideoAlignAnalyser.Options):
        """The analyser's options, and what is read off the scores."""

        aspects: Annotated[dict[Literal["VQ", "MQ", "TA"], float], Field(min_length=1)] | None = None
        """Weight of each of VQ, MQ and TA; those left out are not counted. Null counts all three with weight 1."""
        normalise: bool = True
        """Subtract the mean and divide by the deviation of the authors' data."""

    def __init__(self, options: Options, analyser: VideoAlignAnalyser) -> None:
        super().__init__(options, analyser)
        self.aspects = dict(options.aspects) if options.aspects is not None else dict.fromkeys(ASPECTS, 1.0)
        self.norm = analyser.loaded.norm if options.normalise else dict.fromkeys(ASPECTS, (0.0, 1.0))

    @override
    def read(self, analysis: Tensor, prompts: Sequence[str]) -> Tensor:
        total = torch.zeros(len(analysis))
        for aspect, weight in self.aspects.items():
            mean, std = self.norm[aspect]
            total += weight * (analysis[:, ASPECTS.index(aspect)] - mean) / std
        return total

"""HPSv3 (Ma et al., 2025): Qwen2-VL-7B with a head that scores a picture and its prompt as people would.

As in VideoAlign, the score is read at a token of the instruction, and the network counts positions along the text, as
its authors' forward pass does. Of the two outputs, mean and spread of people's scores, the mean is taken.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from euphonium.config.base import PathOrHubId, UserPath
from euphonium.errors import ConfigError
from euphonium.rewards.frames import check_videos, normalised, quantised, resized, spread
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
from euphonium.rewards.videoalign import PROMPT_PLACE, frame_size, patches
from euphonium.rewards.videoalign_checkpoint import merged_state
from euphonium.text_files import read_text

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
# Pixels that every picture is brought to, as far as its shape in whole patches allows.
PIXELS = 256 * 28 * 28
# Constants of the authors' data_collator_qwen.py that make up the instruction.
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")


def read_instruction(file: Path) -> str:
    """The instruction: a text file, or the authors' ``data_collator_qwen.py``, of which two constants are read.

    Raises:
        ConfigError: no such file, or no instruction with the place of the prompt and the reward's token in it.
    """
    if not file.is_file():
        raise ConfigError(
            f"option template: no file {str(file)!r}; give hpsv3/dataset/data_collator_qwen.py of "
            "https://github.com/MizzenAI/HPSv3, whose wording the published weights were trained with, or a text file"
        )
    text = read_text(file, "option template")
    if file.suffix == ".py":
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                f"option template: {str(file)!r} is no readable Python: {why}; download it again"
            ) from error
        constants = {
            target.id: str(node.value.value)
            for node in body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        text = "".join(constants.get(name, "") for name in CONSTANTS)
    wrong = [part for part in (REWARD_TOKEN, PROMPT_PLACE) if text.count(part) != 1]
    if wrong:
        raise ConfigError(f"option template: {str(file)!r} must hold each of {', '.join(wrong)} exactly once")
    return text


class _Network(nn.Module):
    """Qwen2-VL without its word head, and linear layers with ReLU between them."""

    def __init__(self, config: Qwen2VLConfig, head: Mapping[int, torch.Size]) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.backbone = Qwen2VLModel(config)
        # Numbered as in the published file, where ReLU and dropout have numbers, too.
        self.rm_head = nn.ModuleDict({str(number): nn.Linear(shape[1], shape[0]) for number, shape in head.items()})

    def forward(self, tokens: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor, special: int) -> Tensor:
        """Mean scores, float32 ``[batch]``; arguments as those of VideoAlign's network, for one token."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, len(tokens), -1)
        hidden = self.backbone(
            input_ids=tokens, attention_mask=mask, position_ids=positions, pixel_values=pixels, image_grid_thw=grids,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        x = hidden[torch.arange(len(tokens), device=tokens.device), (tokens == special).int().argmax(dim=1)].float()
        for place, number in enumerate(self.rm_head):
            weight, bias = (self.rm_head.get_parameter(f"{number}.{part}").float() for part in ("weight", "bias"))
            x = nn.functional.linear(x.relu() if place else x, weight, bias)
        return x[:, 0]


class HpsV3:
    """People's preference between pictures of a prompt; unbounded, about 0 to 15."""

    class Options(NetworkOptions):
        """The published file, and how many frames it sees."""

        weights: PathOrHubId
        """File ``HPSv3.safetensors``: a path, or owner/name:file."""
        revision: str | None = None
        """Commit of the hub repository in ``weights``."""
        base: PathOrHubId
        """Folder or hub id of Qwen2-VL-7B-Instruct; only its configuration files are read."""
        base_revision: str | None = None
        """Commit of the hub id in ``base``."""
        template: UserPath
        """HPSv3's data_collator_qwen.py, or a text file with an instruction of your own."""
        frames: PositiveInt = 4
        """Frames of a video that are scored, evenly spread, and averaged."""
        batch: PositiveInt = 4
        """Frames in one forward pass."""
        dtype: Dtype = "bfloat16"
        """Type of the network's weights; the head computes in float32."""

    def __init__(self, options: Options) -> None:
        """Reads the instruction and loads the network.

        Raises:
            ConfigError: a file is missing, not pinned, or of another model; names the option.
        """
        self.options = options
        self._instruction = read_instruction(options.template)
        self._device = device_of(options.device)
        state = merged_state(
            read_weights(hub_file(options.weights, options.revision, "weights"), "weights"), 1, 1, False
        )
        config, self._tokenizer, processor = _base(options)
        self._mean, self._std = tuple(processor.image_mean), tuple(processor.image_std)
        if "language_model.embed_tokens.weight" not in state or "rm_head.0.weight" not in state:
            raise ConfigError(
                f"option weights: {options.weights!r} is no HPSv3: no rm_head or embed_tokens; download or copy it "
                "again"
            )
        config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        # "auto" would pick flash attention's own numbers where it is installed.
        config._attn_implementation = "sdpa"
        numbers = sorted(int(name.split(".")[1]) for name in state if name.startswith("rm_head.") and "weight" in name)
        head = {n: state[f"rm_head.{n}.weight"].shape for n in numbers}
        named = {
            n if n.startswith("rm_head.") else f"backbone.{n}": t.to(dtype_of(options.dtype)) for n, t in state.items()
        }
        together = f"{options.weights} with the configuration of {options.base}"
        network = filled(lambda: _Network(config, head), named, "weights", together)
        self._network = network.to(self._device).eval().requires_grad_(False)
        self._special = int(self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        self._vision = config.vision_config

    @torch.inference_mode()
    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``: the mean over the chosen frames.

        Raises:
            ValueError: a prompt with the network's own tokens in it.
        """
        check_videos(videos, prompts)
        chosen = videos[:, spread(videos.shape[1], self.options.frames)]
        frames, count = chosen.flatten(0, 1), chosen.shape[1]
        asked = [str(prompt) for prompt in prompts for _ in range(count)]
        parts = [
            self._pass(frames[begin : begin + self.options.batch], asked[begin : begin + self.options.batch])
            for begin in range(0, len(frames), self.options.batch)
        ]
        return torch.cat(parts).view(len(videos), count).mean(dim=1)

    def _pass(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        vision, dtype = self._vision, next(self._network.parameters()).dtype
        size = frame_size(
            frames.shape[-2], frames.shape[-1], vision.patch_size * vision.spatial_merge_size, PIXELS, PIXELS
        )
        pixels = normalised(resized(quantised(frames.to(self._device)), *size), self._mean, self._std)
        # A picture is a video of one moment: its frame is repeated to fill a patch.
        some = [
            patches(picture.expand(vision.temporal_patch_size, -1, -1, -1), vision.patch_size,
                    vision.temporal_patch_size, vision.spatial_merge_size)
            for picture in pixels
        ]  # fmt: skip
        grid = some[0][1]
        texts = [self._text(prompt, math.prod(grid) // vision.spatial_merge_size**2) for prompt in prompts]
        tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._device)
        grids = torch.tensor([grid] * len(frames), device=self._device)
        vectors = torch.cat([found for found, _ in some]).to(dtype)
        scores: Tensor = self._network(tokens["input_ids"], tokens["attention_mask"], vectors, grids, self._special)
        return scores.cpu()

    def _text(self, prompt: str, image_tokens: int) -> str:
        """The conversation that the network reads, as one string."""
        if any(token in prompt for token in (REWARD_TOKEN, IMAGE_TOKEN)):
            raise ValueError(f"a prompt must not contain the reward model's own tokens, got {prompt!r}")
        content = [{"type": "image"}, {"type": "text", "text": self._instruction.replace(PROMPT_PLACE, prompt)}]
        conversation = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return str(conversation).replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens, 1)


def _base(options: HpsV3.Options) -> tuple[Qwen2VLConfig, Any, Any]:
    """Configuration, tokenizer with the reward's token, and image processor of Qwen2-VL."""
    from transformers import Qwen2Tokenizer, Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    base = pinned(options.base, options.base_revision, "base")
    with loading("base", options.base):
        tokenizer = Qwen2Tokenizer.from_pretrained(**base, padding_side="right")
        if tokenizer.chat_template is None:
            raise ValueError("its tokenizer has no chat template")
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]}, replace_extra_special_tokens=False)
        return Qwen2VLConfig.from_pretrained(**base), tokenizer, Qwen2VLImageProcessorPil.from_pretrained(**base)

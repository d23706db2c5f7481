"""SoliReward (Lian et al., 2025): InternVL with a scalar head over its layers' states; Euphonium's outcome reward.

Its checkpoints keep the layout of InternVL's own code. They are loaded into transformers' InternVL classes here, names
and fused matrices translated, so that no code of a checkpoint runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from euphonium.config.base import PathOrHubId
from euphonium.errors import ConfigError
from euphonium.rewards.frames import check_videos, cropped, normalised, quantised, resized
from euphonium.rewards.pretrained import PretrainedOptions, device_of, dtype_of, filled, loading, pinned, read_weights

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLModel, Qwen2Tokenizer

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BEGIN, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"
HEADS = 8
SETTINGS_FILE = "training_config.json"
HEAD_NAMES = ("reward_head.", "attention_query")


def segment_middles(frames: int, segments: int) -> list[int]:
    """The frame at the middle of each of ``segments`` equal parts of the time from the first to the last frame."""
    length = (frames - 1) / segments
    return [int(length / 2 + round(length * index)) for index in range(segments)]


def tile_grid(height: int, width: int, tile: int, most: int) -> tuple[int, int]:
    """Rows and columns of square tiles, at most ``most``, whose aspect ratio is nearest to the picture's.

    Of grids that are equally near, the larger one counts where the picture has more than half of its pixels.
    """
    grids = sorted(
        ((rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)),
        key=lambda grid: (grid[0] * grid[1], grid[1]),
    )
    best, nearest = (1, 1), math.inf
    for rows, columns in grids:
        away = abs(width / height - columns / rows)
        if away < nearest or (away == nearest and height * width > 0.5 * tile * tile * rows * columns):
            best, nearest = (rows, columns), away
    return best


def tiles_of(frames: Tensor, tile: int, most: int) -> Tensor:
    """Frames cut into tiles, row by row, and the whole frame as one more tile where there are several.

    Args:
        frames: ``[frames, 3, height, width]``, levels 0 to 255.
        tile: side of a tile in pixels.
        most: tiles that a frame is cut into at most, without the whole frame.

    Returns:
        ``[frames, tiles, 3, tile, tile]``.
    """
    rows, columns = tile_grid(frames.shape[-2], frames.shape[-1], tile, most)
    large = resized(frames, rows * tile, columns * tile)
    cut = large.unfold(2, tile, tile).unfold(3, tile, tile).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    if rows * columns == 1:
        return cut
    return torch.cat([cut, resized(frames, tile, tile)[:, None]], dim=1)


def from_internvl_chat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of InternVL's own checkpoints as transformers' ``InternVLModel`` has them.

    Of each vision layer, queries, keys and values are one matrix there. The language model's word head is left out.
    """
    renamed = (
        (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
        (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.", ".attention."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.ls([12])$", r".lambda_\1"),
        (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
        (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
        (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
        (r"^language_model\.model\.", "language_model."),
    )
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("language_model.lm_head."):
            continue
        for pattern, replacement in renamed:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace(".qkv.", f".{part}_proj.")] = piece.contiguous()
        else:
            result[name] = tensor
    return result


def transformers_config(chat: Mapping[str, Any], image_token: int) -> InternVLConfig:
    """Transformers' configuration of what InternVL's own ``config.json`` describes.

    Raises:
        ValueError: a kind of InternVL that transformers' class is not.
    """
    from transformers import InternVLConfig, Qwen2Config
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    vision, text = dict(chat["vision_config"]), dict(chat["llm_config"])
    if text.get("architectures") != ["Qwen2ForCausalLM"]:
        raise ValueError(f"its language model is {text.get('architectures')}, only Qwen2ForCausalLM is supported")
    if chat.get("ps_version", "v1") != "v2" or chat.get("select_layer", -1) != -1:
        raise ValueError("only ps_version v2 with select_layer -1 is supported")
    size = chat.get("force_image_size") or vision["image_size"]
    ratio = chat.get("downsample_ratio", 0.5)
    known = {*Qwen2Config().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "dtype", "model_type"}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision["hidden_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"],
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision["qk_normalization"],
            norm_type=vision["norm_type"],
            layer_norm_eps=vision["layer_norm_eps"],
            hidden_act=vision["hidden_act"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        ),
        text_config=Qwen2Config(**{name: value for name, value in text.items() if name in known}),
        image_token_id=image_token,
        image_seq_length=int((size // vision["patch_size"]) ** 2 * ratio**2),
        downsample_ratio=ratio,
    )


class QueryPool(nn.Module):
    """One learned query that attends to a sequence; ``[batch, length, width]`` to ``[batch, 1, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Embedding(1, width)
        self.attention = nn.ModuleList([nn.MultiheadAttention(width, HEADS, batch_first=True)])

    def forward(self, states: Tensor, padding: Tensor) -> Tensor:
        """Pools ``states``, of which those where ``padding`` is true do not count."""
        query = self.query.weight.expand(len(states), 1, -1)
        pooled: Tensor = self.attention[0](query, states, states, key_padding_mask=padding, need_weights=False)[0]
        return pooled


class RewardHead(nn.Module):
    """From the language model's states to one number a sequence, in float32.

    ``progressive_hierarchical_attention`` is the published one: a query reads one chosen layer, its answer queries
    the next, and what it has in the end is added to what another query reads from the last layer.
    """

    KINDS = (
        "progressive_hierarchical_attention", "attention", "meanpool", "maxpool", "last_token_hidden_state",
    )  # fmt: skip

    def __init__(self, width: int, kind: str, layers: Sequence[int]) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise ConfigError(
                f"option weights: reward head {kind!r} is not supported; give a checkpoint with one of "
                + ", ".join(self.KINDS)
            )
        self.kind = kind
        self.layers = list(layers)
        if kind == "progressive_hierarchical_attention":
            self.attention_query_first_layer = QueryPool(width)
            self.attention_query_other_layers = nn.ModuleList(
                nn.MultiheadAttention(width, HEADS, batch_first=True) for _ in self.layers[1:]
            )
            self.attention_query_final_layer = QueryPool(width)
        elif kind == "attention":
            self.attention_query = QueryPool(width)
        # Index 2 was dropout in training.
        self.reward_head = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Identity(), nn.Linear(width, 1, bias=False)
        )

    def forward(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Scores ``[batch]``.

        Args:
            states: input of the first layer and output of every layer, the last one normalised:
                ``[batch, length, width]`` each.
            mask: ``[batch, length]``, true where tokens are not padding.
        """
        padding, last = ~mask, states[-1].float()
        if self.kind == "progressive_hierarchical_attention":
            query = self.attention_query_first_layer(states[self.layers[0]].float(), padding)
            for attention, layer in zip(self.attention_query_other_layers, self.layers[1:], strict=True):
                keys = states[layer].float()
                query = attention(query, keys, keys, key_padding_mask=padding, need_weights=False)[0]
            pooled = (query + self.attention_query_final_layer(last, padding)).squeeze(1)
        elif self.kind == "attention":
            pooled = self.attention_query(last, padding).squeeze(1)
        elif self.kind == "meanpool":
            pooled = (last * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        elif self.kind == "maxpool":
            pooled = last.masked_fill(padding[..., None], float("-inf")).amax(dim=1)
        else:
            end = mask.long().cumsum(dim=1).argmax(dim=1)
            pooled = last[torch.arange(len(last), device=last.device), end]
        scores: Tensor = self.reward_head(pooled)
        return scores.squeeze(1)


class SoliReward:
    """The head's number; unbounded, higher is better. Trained to rank, so only differences mean something."""

    class Options(PretrainedOptions):
        """The checkpoint, and the texts that it was trained with."""

        weights: PathOrHubId
        """Folder or hub id with the checkpoint (Yukino271828/SoliReward)."""
        subfolder: str = ""
        """Where the checkpoint lies within ``weights``."""
        system_prompt: str
        """Instruction that the checkpoint was trained with."""
        user_prompt: str
        """What comes before the frames; ``{prompt}`` in it stands for the video's prompt."""
        frames: PositiveInt | None = None
        """Frames that are looked at; null takes the checkpoint's own."""
        max_tiles: PositiveInt | None = None
        """Tiles that a frame is cut into at most; null takes the checkpoint's own."""

    def __init__(self, options: Options) -> None:
        """Loads the network; the checkpoint's ``training_config.json`` says which head, frames and tiles it has.

        Raises:
            ConfigError: a file is missing, not pinned, or of another model; names the option.
        """
        weights = options.weights
        folder = _folder(weights, options.revision, options.subfolder)
        with loading("weights", weights):
            chat = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings = json.loads(_settings_file(folder).read_text(encoding="utf-8"))
            self._tokenizer, config = _tokenizer_and_config(folder, chat)
            backbone, head = _networks(config, settings["model_args"], folder, options)
            images = settings["internvl_args"]
            self.frames = options.frames or int(images["num_segments"])
            self.max_tiles = options.max_tiles or int(images["max_num"])
            self.tile = int(images["input_size"])
            self.crop = bool(images.get("center_crop_video", False))
        self.device = device_of(options.device)
        self.backbone = backbone.to(self.device).eval().requires_grad_(False)
        self.head = head.to(self.device).eval().requires_grad_(False)
        self.options = options

    def text(self, prompt: str, frames: int, tiles: int) -> str:
        """The conversation that the network reads.

        Raises:
            ValueError: a prompt that holds one of the tokens that mark pictures.
        """
        if any(token in prompt for token in (BEGIN, CONTEXT, END)):
            raise ValueError(f"a prompt must not contain the reward model's own tokens, got {prompt!r}")
        picture = BEGIN + CONTEXT * (self.backbone.config.image_seq_length * tiles) + END
        shown = "".join(f"Frame{number}: {picture}\n" for number in range(1, frames + 1))
        messages = [
            {"role": "system", "content": self.options.system_prompt},
            {"role": "user", "content": self.options.user_prompt.replace("{prompt}", prompt) + shown},
        ]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def pixels(self, video: Tensor) -> Tensor:
        """Normalised tiles ``[frames, tiles, 3, tile, tile]`` of a video ``[frames, 3, height, width]`` in [0, 1]."""
        frames = quantised(video[segment_middles(len(video), self.frames)])
        if self.crop:
            side = min(frames.shape[-2:])
            frames = cropped(frames, side, side)
        tiles = tiles_of(frames, self.tile, self.max_tiles)
        return normalised(tiles.flatten(0, 1), IMAGE_MEAN, IMAGE_STD).unflatten(0, tiles.shape[:2])

    @torch.inference_mode()
    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]``, unbounded."""
        check_videos(videos, prompts)
        parts, batch = [], self.options.batch
        for begin in range(0, len(videos), batch):
            pixels = torch.stack([self.pixels(video.to(self.device)) for video in videos[begin : begin + batch]])
            texts = [self.text(prompt, *pixels.shape[1:3]) for prompt in prompts[begin : begin + batch]]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False).to(self.device)
            found = self.backbone(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=pixels.flatten(0, 2).to(self.backbone.dtype),
                output_hidden_states=True,
                use_cache=False,
            )
            parts.append(self.head(found.hidden_states, tokens["attention_mask"].bool()).cpu())
        return torch.cat(parts)


def _folder(weights: str, revision: str | None, subfolder: str) -> Path:
    """The checkpoint's folder, fetched from the hub if need be."""
    source = pinned(weights, revision)
    if Path(weights).is_dir():
        folder = Path(weights) / subfolder
    else:
        from huggingface_hub import snapshot_download

        wanted = [f"{subfolder}/*"] if subfolder else None
        with loading("weights", weights):
            folder = Path(snapshot_download(weights, revision=source["revision"], allow_patterns=wanted)) / subfolder
    if not (folder / "config.json").is_file():
        raise ConfigError(f"option weights: no config.json in {str(folder)!r}; see the option subfolder")
    return folder


def _tokenizer_and_config(folder: Path, chat: Mapping[str, Any]) -> tuple[Qwen2Tokenizer, InternVLConfig]:
    """The checkpoint's tokenizer, and the configuration of the network that its ``config.json`` describes."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder, padding_side="right", local_files_only=True)
    image_token = tokenizer.convert_tokens_to_ids(CONTEXT)
    if tokenizer.chat_template is None or image_token in (None, tokenizer.unk_token_id):
        raise ValueError(f"its tokenizer lacks a chat template or the token {CONTEXT}")
    config = transformers_config(chat, image_token)
    config._attn_implementation = "sdpa"
    return tokenizer, config


def _networks(
    config: InternVLConfig, settings: Mapping[str, Any], folder: Path, options: SoliReward.Options
) -> tuple[InternVLModel, RewardHead]:
    """Both parts of the network with the checkpoint's weights; the head's stay float32."""
    from transformers import InternVLModel

    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= read_weights(file, "weights")
    if not state:
        raise ConfigError(f"option weights: no .safetensors in {str(folder)!r}; download or copy it again")
    heads = {name: part.float() for name, part in state.items() if name.startswith(HEAD_NAMES)}
    width, kind = config.text_config.hidden_size, settings["reduce_sequence"]
    layers = settings.get("hierarchical_query_attn_layers") or []
    head = filled(lambda: RewardHead(width, kind, layers), heads, "weights", options.weights)
    rest = from_internvl_chat({name: part for name, part in state.items() if name not in heads})
    dtype = dtype_of(options.dtype)
    weights = {name: part.to(dtype) for name, part in rest.items()}
    return filled(lambda: InternVLModel(config), weights, "weights", options.weights), head


def _settings_file(folder: Path) -> Path:
    """Training settings lie in the checkpoint's folder, or in older ones beside it."""
    for place in (folder, folder.parent):
        if (place / SETTINGS_FILE).is_file():
            return place / SETTINGS_FILE
    raise FileNotFoundError(f"no {SETTINGS_FILE} in {str(folder)!r} or beside it")

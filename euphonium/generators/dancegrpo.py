"""Prompts that DanceGRPO's preprocessing encoded, read as it leaves them.

Its ``videos2caption.json`` lists captions, each with the names of torch files in folders beside it: ``prompt_embed``
and, by model, ``prompt_attention_mask`` (HunyuanVideo, SkyReels), ``pooled_prompt_embeds`` (FLUX) and
``negative_prompt_embeds`` (Wan, of the empty text). HunyuanVideo's embedding begins with the pooled one, padded with
zeros. Nothing says which encoders they are of, so only their shapes can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from euphonium.errors import ConfigError
from euphonium.generators.conditioning import Conditioning, stack_conditionings
from euphonium.generators.generator import Generator
from euphonium.prompt_files import read_prompt_file
from euphonium.text_files import quoted, shown

LIST = "videos2caption.json"
# Folder of the files that an entry names, by the entry's key.
FOLDERS = {
    "prompt_embed_path": "prompt_embed",
    "prompt_attention_mask": "prompt_attention_mask",
    "pooled_prompt_embeds_path": "pooled_prompt_embeds",
    "negative_prompt_embeds_path": "negative_prompt_embeds",
}
EMBEDDING, MASK, POOLED, OF_NOTHING = FOLDERS
Parts = Mapping[str, Tensor]


class ReleasedEmbeddings:
    """Encoded prompts in the files of DanceGRPO's preprocessing; implements ``Embeddings`` (embeddings.py)."""

    def __init__(self, path: Path, generator: Generator, field: str) -> None:
        """Reads the list.

        Args:
            path: ``videos2caption.json``.
            generator: the generator that the prompts are for.
            field: the recipe's field that names it, for errors.

        Raises:
            ConfigError: it cannot be read, or that project has no embeddings for this generator.
        """
        if path.suffix.lower() != ".json":
            raise ConfigError(f"{field}: {path} is neither a store of euphonium preprocess nor a {LIST}; give one")
        if generator.pipeline_class not in LAYOUTS:
            raise ConfigError(
                f"{field}: {path}: that project's preprocessing is for {', '.join(LAYOUTS)}, and model.path is a "
                f"{generator.pipeline_class}; encode the prompts with euphonium preprocess"
            )
        self.path = path
        self._generator = generator
        self._field = field
        self._layout = LAYOUTS[generator.pipeline_class]
        self._files = {
            prompt.text: self._named(prompt.metadata, prompt.text) for prompt in read_prompt_file(path, field)
        }
        first = next(iter(self._files.values()))
        if self._layout.negative and OF_NOTHING in first and "" not in self._files:
            self._files[""] = {EMBEDDING: first[OF_NOTHING]}

    def __contains__(self, text: str) -> bool:
        return text in self._files

    def check(self) -> None:
        """Checks that all files are there, and that the first embedding suits the generator.

        Raises:
            ConfigError: they do not.
        """
        missing = [file for files in self._files.values() for file in files.values() if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{self._field}: {len(missing)} files that {self.path} names are missing, for example {missing[0]}; "
                "copy the folders beside it, or encode the prompts with euphonium preprocess"
            )
        self.encode(list(self._files)[:1])

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditionings of prompts as one batch; a :data:`PromptEncoder`.

        Raises:
            ConfigError: a prompt is not in the list, or its files do not suit the generator.
        """
        return stack_conditionings([self._read(prompt) for prompt in prompts])

    def _named(self, entry: Mapping[str, object], text: str) -> dict[str, Path]:
        """The files of an entry, by the keys that name them."""
        found = {}
        for key in (*self._layout.keys, OF_NOTHING):
            name = entry.get(key)
            if isinstance(name, str) and name:
                found[key] = self.path.parent / FOLDERS[key] / name
            elif key in self._layout.keys:
                raise ConfigError(
                    f"{self._field}: {self.path}: the entry {quoted(text)} has no {key!r}, which names its file in "
                    f"{FOLDERS[key]}; give the list that DanceGRPO's preprocessing wrote for this model, or encode the "
                    "prompts with euphonium preprocess"
                )
        return found

    def _read(self, prompt: str) -> Conditioning:
        if prompt not in self._files:
            raise ConfigError(
                f"{self._field}: {self.path} lacks the prompt {quoted(prompt)}; encode it with euphonium preprocess"
            )
        files = self._files[prompt]
        parts = {key: _load(files[key], self._field) for key in self._layout.keys}
        try:
            made = self._layout.read(self._generator, parts)
        except ValueError as error:
            raise ConfigError(
                f"{self._field}: {files[EMBEDDING]} does not suit {self._generator.folder}: {error}; encode the "
                "prompts with euphonium preprocess"
            ) from error
        return {name: tensor.to(self._generator.dtype) for name, tensor in made.items()}


def _load(file: Path, field: str) -> Tensor:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{field}: {file} cannot be read ({shown(error, 200)}); copy it again, or encode the prompts with "
            "euphonium preprocess"
        ) from error
    if not isinstance(found, Tensor):
        raise ConfigError(f"{field}: {file} holds a {type(found).__name__}; it should hold one tensor")
    return found


def _hunyuan_video(generator: Generator, parts: Parts) -> Conditioning:
    config, limit = generator.transformer_config(), generator.config.max_prompt_tokens
    width, pooled = int(config["text_embed_dim"]), int(config["pooled_projection_dim"])
    whole, mask = parts[EMBEDDING], parts[MASK].bool()
    _require(whole, (None, width))
    _require(mask, (len(whole) - 1,))
    length = max(1, int(mask.sum()))
    if length > limit:
        raise ValueError(f"it has {length} tokens, and model.max_prompt_tokens is {limit}")
    if not bool(mask[:length].all()):
        raise ValueError("its mask has a gap")
    if bool(whole[0, pooled:].any()):
        raise ValueError(f"its pooled embedding is wider than {pooled}")
    return {
        "encoder_hidden_states": whole[None, 1 : 1 + length],
        "encoder_attention_mask": mask[None, :length],
        "pooled_projections": whole[:1, :pooled],
    }


def _flux(generator: Generator, parts: Parts) -> Conditioning:
    config = generator.transformer_config()
    _require(parts[EMBEDDING], (generator.config.max_prompt_tokens, int(config["joint_attention_dim"])))
    _require(parts[POOLED], (int(config["pooled_projection_dim"]),))
    return {"encoder_hidden_states": parts[EMBEDDING][None], "pooled_projections": parts[POOLED][None]}


def _wan(generator: Generator, parts: Parts) -> Conditioning:
    width = int(generator.transformer_config()["text_dim"])
    _require(parts[EMBEDDING], (generator.config.max_prompt_tokens, width))
    return {"encoder_hidden_states": parts[EMBEDDING][None]}


def _require(tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Checks a shape, of which None may be anything."""
    if tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        wanted = json.dumps(["any" if size is None else size for size in shape])
        raise ValueError(f"a shape of {list(tensor.shape)} instead of {wanted} (tokens go by model.max_prompt_tokens)")
    if not bool(tensor.isfinite().all()):
        raise ValueError("it is not finite")


@dataclass(frozen=True)
class _Layout:
    """What is kept of a model's prompts: keys of an entry, what their tensors mean, whether the empty text is there."""

    keys: tuple[str, ...]
    read: Callable[[Generator, Parts], Conditioning]
    negative: bool = False


LAYOUTS = {
    "HunyuanVideoPipeline": _Layout((EMBEDDING, MASK), _hunyuan_video),
    "HunyuanSkyreelsImageToVideoPipeline": _Layout((EMBEDDING, MASK), _hunyuan_video),
    "FluxPipeline": _Layout((EMBEDDING, POOLED), _flux),
    "WanPipeline": _Layout((EMBEDDING,), _wan, negative=True),
}

"""What the roles need of a generator family: one small class per diffusers pipeline.

A family object is cheap: it reads configuration files only. Each role loads the parts that it needs: rollout actors
the transformer and the text encoders, outcome-reward servers the VAE, learners the transformer alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from euphonium.config import GuidanceConfig, ModelConfig, PromptsConfig, SamplerConfig
from euphonium.dynamics import StepTable, shifted_sigmas
from euphonium.errors import ConfigError
from euphonium.prompt_files import prompt_images

# Batch-first tensors that a transformer takes besides state and time; the names are its keyword arguments.
Conditioning = dict[str, Tensor]
# Entry of a conditioning that holds the latents of its first frame.
IMAGE = "image_latents"
# Marks the negative prompt's entries of a conditioning.
NEGATIVE = "negative."
PromptEncoder = Callable[[Sequence[str]], Conditioning]
# Latents of the pictures in some files, ``[batch, channels, 1, height, width]``.
ImageEncoder = Callable[[Sequence[Path]], Tensor]
Decoder = Callable[[Tensor], Tensor]
# What the weights of a component are called; the hub keeps other precisions and copies beside them.
_WEIGHT_FILE = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")


class GeneratorFamily(ABC):
    """One generator of a family.

    Attributes:
        folder: the diffusers pipeline on disk.
        config: shape and type of what it generates.
    """

    pipeline_class: ClassVar[str]
    # The pipeline's component that is trained.
    backbone: ClassVar[str] = "transformer"
    # Fields of its configuration that count its blocks, in the order in which a sample passes them.
    block_fields: ClassVar[tuple[str, ...]] = ("num_layers",)
    # Whether every prompt comes with a picture (image-to-video).
    takes_image: ClassVar[bool] = False

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Args as described in the class.

        Raises:
            ConfigError: a size or a guidance that this generator cannot take.
        """
        self.folder = folder
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self._check_size()
        self._check_guidance()

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """Frames, and pixels a side, behind one latent; no frames for generators of images."""

    @property
    def patch_size(self) -> int:
        """Latents a side in one token."""
        return 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents ``[channels, frames, height, width]``."""
        temporal, spatial = self.compression
        return (
            self.latent_channels,
            (self.config.frames - 1) // temporal + 1 if temporal else 1,
            self.config.height // spatial,
            self.config.width // spatial,
        )

    @abstractmethod
    def transformer_class(self) -> type[nn.Module]:
        """The diffusers class of the transformer."""

    @abstractmethod
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """Text tokenizers and encoders as one function from prompts to conditioning."""

    @abstractmethod
    def load_decoder(self, device: torch.device) -> Decoder:
        """The VAE as a function from latents to videos ``[batch, frames, 3, height, width]`` in [0, 1]."""

    @abstractmethod
    def network(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward pass.

        Args:
            transformer: of this family.
            x: float32 states ``[batch, *latent_shape]``.
            time: float32 ``[batch]``, as a fraction of the network's range
                (:attr:`euphonium.dynamics.StepTable.times`); the noise fraction in flow matching.
            conditioning: of the same batch size, without the negative prompt's.

        Returns:
            float32, like ``x``: the velocity ``eps - x0``, or the noise for models that predict it.
        """

    def velocity(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The output that sampling and likelihood use: :meth:`network`, with classifier-free guidance if configured.

        Rollout and learner both call this, so guidance is differentiated through in training (DanceGRPO, App. C).
        """
        output = self.network(transformer, x, time, positive(conditioning))
        if self.config.cfg_scale is None:
            return output
        negative = {n.removeprefix(NEGATIVE): t for n, t in conditioning.items() if n.startswith(NEGATIVE)}
        unconditional = self.network(transformer, x, time, negative)
        return unconditional + self.config.cfg_scale * (output - unconditional)

    def step_table(self, sampler: SamplerConfig, iteration: int = 0) -> StepTable:
        """The table of a sampler for this model.

        Args:
            sampler: settings.
            iteration: from 0; moving windows depend on it.

        Raises:
            StepTableError: settings that make a step undefined.
            ConfigError: a law that does not fit what this model predicts.
        """
        if sampler.law == "ddim":
            raise ConfigError(f"sampler.law: ddim is for models that predict the noise; {self.pipeline_class} does not")
        return sampler.table(iteration)

    def ode_table(self, num_steps: int, shift: float, guidance: GuidanceConfig | None = None) -> StepTable:
        """The table of deterministic sampling."""
        return StepTable.build(
            "ode", shifted_sigmas(num_steps, shift), guidance=guidance.build() if guidance is not None else None
        )

    def prompt_encoder(self, device: torch.device, images: Mapping[str, Path] | None = None) -> PromptEncoder:
        """Conditioning of prompts, with that of the negative prompt where classifier-free guidance needs it.

        Args:
            device: to encode on.
            images: pictures by prompt, for families of image-to-video (:func:`images_for`).

        Returns:
            A function that raises ConfigError if a prompt lacks its picture.
        """
        encode = self.load_prompt_encoder(device)
        encode_images = self.load_image_encoder(device) if self.takes_image else None
        negative = encode([self.config.negative_prompt]) if self.config.cfg_scale is not None else {}

        def complete(prompts: Sequence[str]) -> Conditioning:
            whole = encode(prompts)
            whole |= {NEGATIVE + name: t.expand(len(prompts), *t.shape[1:]) for name, t in negative.items()}
            if encode_images is not None:
                whole[IMAGE] = encode_images([self._image_of(prompt, images or {}) for prompt in prompts])
                if negative:
                    whole[NEGATIVE + IMAGE] = whole[IMAGE]
            return whole

        return complete

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """The VAE as a function from pictures to latents, in families that take an image.

        Raises:
            ConfigError: this one takes none.
        """
        raise ConfigError(
            f"model.path: {self.folder} is a {self.pipeline_class}, which takes no image; for image-to-video give a "
            "pipeline that does, such as a HunyuanSkyreelsImageToVideoPipeline"
        )

    def _image_of(self, prompt: str, images: Mapping[str, Path]) -> Path:
        if prompt not in images:
            raise ConfigError(
                f"prompts: {prompt!r} has no image, which {self.pipeline_class} begins its video with; give prompts in "
                '.jsonl files, one {"prompt": ..., "image": ...} a line'
            )
        return images[prompt]

    def build_trunk(self, blocks: int) -> nn.Module:
        """A transformer of this family with only its first ``blocks`` blocks, and fresh weights.

        Raises:
            ConfigError: it has fewer blocks, or none that a trunk could be cut from.
        """
        return self.build_transformer(self.trunk_config(blocks))

    def trunk_config(self, blocks: int) -> dict[str, Any]:
        """Configuration of the transformer that :meth:`build_trunk` builds, with its errors."""
        config = self.transformer_config()
        counts = [int(config[field]) for field in self.block_fields]
        if not 1 <= blocks <= sum(counts):
            raise ConfigError(f"a trunk of {blocks} blocks cannot be cut from {self.folder}, which has {sum(counts)}")
        for field, count in zip(self.block_fields, counts, strict=True):
            config[field] = min(blocks, count)
            blocks -= config[field]
        return config

    def token_width(self) -> int:
        """Width of the transformer's tokens."""
        config = self.transformer_config()
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def output_norm(self, transformer: nn.Module) -> nn.Module:
        """The module whose input is the output of the last block, tokens of the sample only."""
        return transformer.get_submodule("norm_out")

    def fingerprint(self) -> dict[str, str]:
        """Marks of the latent space and of the text embeddings, which a process reward model is tied to."""
        parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        return {part: weights_mark(self.folder / part) for part in parts if (self.folder / part).is_dir()}

    def component_config(self, name: str) -> dict[str, Any]:
        """Configuration of one of the pipeline's networks."""
        return dict(json.loads((self.folder / name / "config.json").read_text()))

    def with_decoding(self, vae: Any) -> Any:
        """A diffusers VAE with the memory savers of ``model.vae_tiling`` and ``model.vae_slicing``.

        Raises:
            ConfigError: this VAE has none of that kind.
        """
        for option in ("tiling", "slicing"):
            if getattr(self.config, f"vae_{option}"):
                enable = getattr(vae, f"enable_{option}", None)
                if enable is None:
                    raise ConfigError(f"model.vae_{option}: {type(vae).__name__} cannot do that; leave it off")
                enable()
        return vae

    def transformer_config(self) -> dict[str, Any]:
        """Configuration of the transformer, as its class takes it."""
        return self.component_config(self.backbone)

    def build_transformer(self, config: dict[str, Any] | None = None) -> nn.Module:
        """A transformer with fresh weights, of the generator's configuration or of another one.

        Buffers that belong to the weights are read from disk: learners, which fill in parameters only, must compute
        with the same ones as rollout actors.
        """
        chosen = self.transformer_config() if config is None else config
        built: nn.Module = self.transformer_class().from_config(chosen)  # type: ignore[attr-defined]
        self._fill_buffers(built)
        return nn.Module.to(self.with_exact_buffers(built), dtype=self.dtype)

    def load_transformer(self, device: torch.device) -> nn.Module:
        """The transformer with the weights on disk, in evaluation mode."""
        loaded: nn.Module = self.transformer_class().from_pretrained(  # type: ignore[attr-defined]
            self.folder / self.backbone, dtype=self.dtype, use_safetensors=True
        )
        # diffusers keeps some weights in float32 (and its own method warns of rounding them), but ZeRO-3 has one type
        # for all: what rollout actors compute with must be what learners train.
        return nn.Module.to(self.with_exact_buffers(loaded), device=device, dtype=self.dtype).eval()

    def with_exact_buffers(self, transformer: nn.Module) -> nn.Module:
        """Protects buffers that must not be rounded, which most families do not have, from casts of the weights.

        Learners build transformers under ``zero.Init``, which rounds whatever a constructor computes.
        """
        return transformer

    def transformer_files(self) -> list[Path]:
        """The safetensors files that hold the transformer's weights."""
        return weight_files(self.folder / self.backbone)

    def export(self, state: Mapping[str, Tensor], target: Path) -> None:
        """Writes a complete diffusers pipeline with other transformer weights.

        Args:
            state: full state of the transformer.
            target: new folder; everything but the transformer's weights is copied from this pipeline. Files in its
                root that hold a whole model once more are left out: they would be the old one.
        """
        from safetensors.torch import save_file

        components = {name for name in self._index() if not name.startswith("_")}

        def others(folder: str, names: list[str]) -> list[str]:
            if Path(folder) == self.folder / self.backbone:
                return [name for name in names if name != "config.json"]
            if Path(folder) == self.folder:
                # Repositories may hold the same weights once more, as one file beside the components.
                return [n for n in names if n not in components and Path(n).suffix in (".safetensors", ".ckpt", ".bin")]
            return []

        shutil.copytree(self.folder, target, dirs_exist_ok=True, ignore=others)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, target / self.backbone / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def _index(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "model_index.json").read_text()))

    def _fill_buffers(self, transformer: nn.Module) -> None:
        from safetensors import safe_open

        buffers = dict(transformer.named_buffers())
        for file in self.transformer_files() if buffers else ():
            with safe_open(file, framework="pt") as stream:
                for name in buffers.keys() & set(stream.keys()):
                    buffers[name].copy_(stream.get_tensor(name))

    def _check_size(self) -> None:
        temporal, spatial = self.compression
        frames, step = self.config.frames, spatial * self.patch_size
        if temporal == 0 and frames != 1:
            raise ConfigError(f"model.frames: {self.pipeline_class} makes images; set it to 1 instead of {frames}")
        if temporal and (frames - 1) % temporal:
            raise ConfigError(
                f"model.frames: {self.folder} makes 1 frame and then {temporal} at a time; {frames} is not among "
                f"those numbers, {(frames - 1) // temporal * temporal + 1} is"
            )
        for field, size in (("height", self.config.height), ("width", self.config.width)):
            if size % step:
                raise ConfigError(f"model.{field}: {self.folder} needs a multiple of {step}, which {size} is not")

    def _check_guidance(self) -> None:
        takes_guidance = bool(self.transformer_config().get("guidance_embeds", False))
        if takes_guidance and self.config.embedded_guidance is None:
            raise ConfigError(
                f"model.embedded_guidance: {self.folder} is guidance-distilled and needs the scale as an input"
            )
        if not takes_guidance and self.config.embedded_guidance is not None:
            raise ConfigError(
                f"model.embedded_guidance: {self.folder} takes no guidance scale as an input; leave it out, and set "
                "model.cfg_scale for classifier-free guidance"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, without the copies in other precisions that the hub may hold."""
    return sorted(file for file in folder.glob("*.safetensors") if _WEIGHT_FILE.fullmatch(file.name))


def hold_buffers(module: nn.Module) -> None:
    """Makes a module's own buffers keep their type in later casts; they still move between devices."""

    class Holding(type(module)):  # type: ignore[misc]
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            exact = dict(self.named_buffers(recurse=False))
            super()._apply(fn, recurse)
            for name, buffer in exact.items():
                setattr(self, name, buffer.to(getattr(self, name).device))
            return self

    module.__class__ = Holding


def weights_mark(folder: Path) -> str:
    """Hash that tells two components apart without reading all of their gigabytes.

    Covers the configuration, and the size and the first and last MiB of every weight file.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    span = 1 << 20
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(span))
            stream.seek(max(0, size - span))
            digest.update(stream.read(span))
    return digest.hexdigest()[:16]


def positive(conditioning: Conditioning) -> Conditioning:
    """A conditioning without the negative prompt's entries."""
    return {name: tensor for name, tensor in conditioning.items() if not name.startswith(NEGATIVE)}


def expand(conditioning: Conditioning, batch: int) -> Conditioning:
    """Repeats the conditioning of one prompt for a batch, without copying."""
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in conditioning.items()}


def images_for(family: GeneratorFamily, prompts: PromptsConfig) -> dict[str, Path]:
    """The pictures of a run's prompts, if its generator takes any.

    Raises:
        ConfigError: see :func:`euphonium.prompt_files.prompt_images`.
    """
    return prompt_images([prompts.train, prompts.evaluation]) if family.takes_image else {}


def stack_conditionings(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch of conditionings that may differ in length: shorter ones are padded with zeros, masked out."""
    stacked: Conditioning = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].dim() > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [
                t if t.shape[1] == longest
                else torch.cat([t, t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:])], dim=1)
                for t in tensors
            ]  # fmt: skip
        stacked[name] = torch.cat(tensors)
    return stacked


def open_generator(config: ModelConfig) -> GeneratorFamily:
    """Finds the family of a pipeline by the class that its ``model_index.json`` names.

    Raises:
        ConfigError: the folder holds no pipeline, or one of a family that has no adapter.
    """
    from euphonium.generators.registry import FAMILIES

    folder = _local_folder(config)
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(f"model.path: {folder} holds no diffusers pipeline (model_index.json is missing)")
    name = json.loads(index.read_text())["_class_name"]
    if name not in FAMILIES:
        raise ConfigError(
            f"model.path: {folder} is a {name}, for which there is no adapter; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name](folder, config)


def _local_folder(config: ModelConfig) -> Path:
    folder = Path(config.path)
    if folder.exists():
        return folder
    if config.path.count("/") != 1 or config.path.startswith((".", "/")):
        raise ConfigError(f"model.path: {config.path} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                # The components only: many repositories hold the same weights in other formats too.
                allow_patterns=["model_index.json", "*/*"],
                ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.non_ema.*"],
            )
        )
    except Exception as error:
        raise ConfigError(
            f"model.path: {config.path} is no folder here and could not be downloaded ({error}); "
            "give a local folder, or check name, network and HF_TOKEN"
        ) from error

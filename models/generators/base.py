"""What the roles need of a generator family: one small class per diffusers pipeline.

A family object is cheap: it reads configuration files only. Each role loads the parts that it needs: rollout actors
the transformer and the text encoders, outcome-reward servers the VAE, learners the transformer alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.config import GuidanceConfig, ModelConfig, SamplerConfig
from core.errors import ConfigError
from dynamics import StepTable, shifted_sigmas

# Batch-first tensors that a transformer takes besides state and time; the names are its keyword arguments.
Conditioning = dict[str, Tensor]
# Marks the negative prompt's entries of a conditioning.
NEGATIVE = "negative."
PromptEncoder = Callable[[Sequence[str]], Conditioning]
Decoder = Callable[[Tensor], Tensor]


class GeneratorFamily(ABC):
    """One generator of a family.

    Attributes:
        folder: the diffusers pipeline on disk.
        config: shape and type of what it generates.
    """

    pipeline_class: ClassVar[str]

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self.dtype = getattr(torch, config.dtype)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents ``[channels, frames, height, width]``."""

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
            time: float32 ``[batch]``, as a fraction of the network's range (:attr:`dynamics.StepTable.times`); the
                noise fraction in flow matching.
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

    def prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """Conditioning of prompts, with that of the negative prompt where classifier-free guidance needs it."""
        encode = self.load_prompt_encoder(device)
        if self.config.cfg_scale is None:
            return encode
        negative = encode([self.config.negative_prompt])

        def with_negative(prompts: Sequence[str]) -> Conditioning:
            both = encode(prompts)
            return both | {NEGATIVE + name: t.expand(len(prompts), *t.shape[1:]) for name, t in negative.items()}

        return with_negative

    @abstractmethod
    def build_trunk(self, blocks: int) -> nn.Module:
        """A transformer of this family with only its first ``blocks`` blocks, and fresh weights."""

    @abstractmethod
    def token_width(self) -> int:
        """Width of the transformer's tokens."""

    @abstractmethod
    def output_norm(self, transformer: nn.Module) -> nn.Module:
        """The module whose input is the output of the last block, tokens of the sample only."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Marks of the latent space and of the text embeddings, which a process reward model is tied to."""

    def transformer_config(self) -> dict[str, Any]:
        """Configuration of the transformer, as its class takes it."""
        return dict(json.loads((self.folder / "transformer" / "config.json").read_text()))

    def build_transformer(self, config: dict[str, Any] | None = None) -> nn.Module:
        """A transformer with fresh weights, of the generator's configuration or of another one."""
        chosen = self.transformer_config() if config is None else config
        built: nn.Module = self.transformer_class().from_config(chosen)  # type: ignore[attr-defined]
        return built if self.dtype == torch.float32 else built.to(self.dtype)

    def load_transformer(self, device: torch.device) -> nn.Module:
        """The transformer with the weights on disk, in evaluation mode."""
        loaded: nn.Module = self.transformer_class().from_pretrained(  # type: ignore[attr-defined]
            self.folder / "transformer", torch_dtype=self.dtype, use_safetensors=True, low_cpu_mem_usage=False
        )
        return loaded.to(device).eval()

    def transformer_files(self) -> list[Path]:
        """The safetensors files that hold the transformer's weights."""
        return sorted((self.folder / "transformer").glob("*.safetensors"))

    def export(self, state: Mapping[str, Tensor], target: Path) -> None:
        """Writes a complete diffusers pipeline with other transformer weights.

        Args:
            state: full state of the transformer.
            target: new folder; everything but the transformer's weights is copied from this pipeline.
        """
        from safetensors.torch import save_file

        shutil.copytree(
            self.folder, target, dirs_exist_ok=True,
            ignore=lambda folder, names: [n for n in names if "transformer" in folder and n.endswith("tensors")]
            + [n for n in names if "transformer" in folder and n.endswith(".index.json")],
        )  # fmt: skip
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, target / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def weights_mark(folder: Path) -> str:
    """Hash that tells two components apart without reading all of their gigabytes.

    Covers the configuration, and the size and the first and last MiB of every weight file.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    span = 1 << 20
    for file in sorted(folder.glob("*.safetensors")):
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
    from models.generators.registry import FAMILIES

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
        return Path(snapshot_download(config.path, revision=config.revision))
    except Exception as error:
        raise ConfigError(
            f"model.path: {config.path} is no folder here and could not be downloaded ({error}); "
            "give a local folder, or check name, network and HF_TOKEN"
        ) from error

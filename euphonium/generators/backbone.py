"""The trained network of a pipeline: how it is built, loaded, cut to its first blocks, and exported.

The base of :class:`euphonium.generators.generator.Generator`, which defines the network's inputs and outputs. Learners
build the network, rollout actors load it, and process reward models start from its first blocks.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.folder import ComponentConfig, PipelineFolder
from euphonium.generators.sample_size import write_sample_size


class NetworkClass(Protocol):
    """A network class of diffusers, as far as it is used here."""

    def from_config(self, config: ComponentConfig) -> nn.Module:
        """A network with newly initialised weights."""
        ...

    def from_pretrained(self, folder: Path, *, dtype: torch.dtype, use_safetensors: bool) -> nn.Module:
        """A network with the weights in a component's folder."""
        ...


def block_classes(network: nn.Module) -> list[str]:
    """Names of the classes of a network's transformer blocks, which are gathered and computed as a whole."""
    named = getattr(network, "_no_split_modules", None) or getattr(network, "_repeated_blocks", None) or ()
    return [name for name in named if name.endswith("TransformerBlock")]


def _taking_plain_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose tensors are laid out without gaps: a compiled one is compiled anew for every layout.

    Blocks get slices of the tokens of clip and prompt, whose strides depend on the length of the prompt.
    """

    def plain(value: Any) -> Any:
        return value.contiguous().view(-1).view(value.shape) if isinstance(value, Tensor) else value

    @wraps(function)
    def forward(*args: Any, **more: Any) -> Any:
        return function(*map(plain, args), **{name: plain(value) for name, value in more.items()})

    return forward


class Backbone(ABC):
    """The trained network of one pipeline.

    Attributes:
        pipeline: the diffusers pipeline on disk.
        folder: path of the pipeline.
        config: the recipe's section ``model``.
        dtype: type that the network computes in.
    """

    # The pipeline's component that is trained.
    backbone: ClassVar[str] = "transformer"
    # Fields of its configuration that count its blocks, in the order in which a sample passes them.
    block_fields: ClassVar[tuple[str, ...]] = ("num_layers",)
    # Whether its attention processors exchange the tokens that ranks share by themselves, with any backend.
    exchanges_tokens: ClassVar[bool] = False

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        self.pipeline = pipeline
        self.folder = pipeline.path
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)

    @abstractmethod
    def transformer_class(self) -> NetworkClass:
        """The diffusers class of the transformer."""

    def transformer_config(self) -> ComponentConfig:
        """Configuration of the transformer, as its class takes it."""
        return self.pipeline.component_config(self.backbone)

    def transformer_files(self) -> list[Path]:
        """The safetensors files that hold the transformer's weights."""
        return self.pipeline.weight_files(self.backbone)

    def trained_components(self) -> dict[str, str]:
        """The components that the network is made of, by what the names of their weights begin with in it."""
        return {"": self.backbone}

    def stored_weights(self) -> list[tuple[str, Path]]:
        """The safetensors files of the whole network, each with what its names begin with in the network."""
        parts = self.trained_components().items()
        return [(prefix, file) for prefix, part in parts for file in self.pipeline.weight_files(part)]

    def trains(self, name: str) -> bool:
        """Whether a weight of the network is trained where there are no adapters."""
        return True

    def export(self, state: Mapping[str, Tensor], target: Path) -> None:
        """Writes a complete diffusers pipeline with new weights of the transformer, and the size of its samples.

        Args:
            state: full state of the network, or of those of its components that were trained.
            target: new folder; see :meth:`PipelineFolder.export`.
        """
        states = {
            part: {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
            for prefix, part in self.trained_components().items()
        }
        self.pipeline.export({part: new for part, new in states.items() if new}, target)
        write_sample_size(self.config, target)

    def build_transformer(self, config: ComponentConfig | None = None) -> nn.Module:
        """A transformer with newly initialised weights, of the generator's configuration or of another one.

        Buffers that are stored with the weights are read from disk: learners, which then load parameters only, must
        compute with the same buffers as rollout actors.
        """
        built = self.transformer_class().from_config(self.transformer_config() if config is None else config)
        self._fill_buffers(built)
        self._choose_attention(self.prepare(built))
        return nn.Module.to(self.with_exact_buffers(built), dtype=self.dtype)

    def load_transformer(self, device: torch.device) -> nn.Module:
        """The transformer with the pipeline's weights, in evaluation mode."""
        return self._load_component(self.backbone, device)

    def _load_component(self, name: str, device: torch.device) -> nn.Module:
        loaded = self.transformer_class().from_pretrained(self.folder / name, dtype=self.dtype, use_safetensors=True)
        self._choose_attention(self.prepare(loaded))
        # diffusers keeps some weights in float32 (and its own method warns of rounding them), but ZeRO-3 has one type
        # for all: what rollout actors compute with must be what learners train.
        return nn.Module.to(self.with_exact_buffers(loaded), device=device, dtype=self.dtype).eval()

    def with_exact_buffers(self, transformer: nn.Module) -> nn.Module:
        """Restores buffers that must not be rounded, and protects them from casts; most families have none.

        Learners build transformers under ``zero.Init``, which rounds whatever a constructor computes.
        """
        return transformer

    def prepare(self, transformer: nn.Module) -> nn.Module:
        """Changes a new transformer in place where its own ways do not suit ours; most families need nothing."""
        return transformer

    def context_parallel_plan(self) -> dict[str, Any] | None:
        """How diffusers shares a sample's tokens among ranks, by module; None if they cannot be shared.

        A family declares it: a plan of diffusers says nothing of gradients, which tests compare.
        """
        return None

    def build_trunk(self, blocks: int) -> nn.Module:
        """A trunk: the transformer with only its first ``blocks`` blocks, and newly initialised weights.

        Raises:
            ConfigError: the transformer has fewer blocks, or no trunk can be cut from this network.
        """
        return self.build_transformer(self.trunk_config(blocks))

    def trunk_config(self, blocks: int) -> ComponentConfig:
        """Configuration of the transformer that :meth:`build_trunk` builds; raises the same errors."""
        config = self.transformer_config()
        counts = [int(config[field]) for field in self.block_fields]
        if not 1 <= blocks <= sum(counts):
            raise ConfigError(f"a trunk of {blocks} blocks cannot be cut from {self.folder}, which has {sum(counts)}")
        for field, count in zip(self.block_fields, counts, strict=True):
            config[field] = min(blocks, count)
            blocks -= config[field]
        return config

    def token_width(self) -> int:
        """Width of the transformer's tokens.

        Raises:
            ConfigError: this network has no tokens.
        """
        config = self.transformer_config()
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def output_norm(self, transformer: nn.Module) -> nn.Module:
        """The module whose input is the last block's output."""
        return transformer.get_submodule("norm_out")

    def sample_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens ``[batch, tokens, width]`` of the sample among the inputs of :meth:`output_norm`; mostly all."""
        return tokens

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

    def compile_blocks(self, transformer: nn.Module, backend: str = "inductor") -> None:
        """Compiles the blocks of a transformer that is not trained, each kind at its first call.

        A second length of prompts compiles them once more, for all lengths; further ones do not.

        Args:
            transformer: the network.
            backend: torch's compiler.
        """
        names = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None) or ()
        for block in transformer.modules():
            if type(block).__name__ in names:
                block.forward = _taking_plain_tensors(torch.compile(block.forward, backend=backend))

    def _choose_attention(self, transformer: nn.Module) -> None:
        if self.config.attention_backend is None:
            return
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        # diffusers makes a network's backend that of the whole process, reward models included.
        before = _AttentionBackendRegistry._active_backend
        try:
            transformer.set_attention_backend(self.config.attention_backend)  # type: ignore[operator]
        finally:
            _AttentionBackendRegistry._active_backend = before

    def _check_attention(self) -> None:
        name = self.config.attention_backend
        if name is None:
            return
        from diffusers.models.attention_dispatch import AttentionBackendName

        names = [backend.value for backend in AttentionBackendName]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            meant = f"did you mean {near[0]!r} among" if near else "give one of"
            raise ConfigError(f"model.attention_backend: diffusers knows no {name!r}; {meant} {', '.join(names)}")

    def _fill_buffers(self, transformer: nn.Module) -> None:
        from safetensors import safe_open

        buffers = dict(transformer.named_buffers())
        for file in self.transformer_files() if buffers else ():
            with safe_open(file, framework="pt") as stream:
                for name in buffers.keys() & set(stream.keys()):
                    buffers[name].copy_(stream.get_tensor(name))

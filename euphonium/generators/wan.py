"""Wan 2.1 and 2.2: text-to-video with a UMT5 text encoder, guided by classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.folder import ComponentConfig, PipelineFolder
from euphonium.generators.generator import Generator
from euphonium.generators.vae import Autoencoder, VideoVae

TIMESTEPS = 1000.0
# Components that are trained, by ``model.trained``, of models with two transformers.
TRAINED = {
    "both": ("transformer", "transformer_2"),
    "high_noise": ("transformer",),
    "low_noise": ("transformer_2",),
}


class Wan(Generator):
    """Adapter of ``WanPipeline``.

    Wan 2.2 A14B shares its steps between two transformers, which are one network here (experts.py).

    Wan 2.2 TI2V takes a time for every token. Without a picture all of them are the same, and the network computes as
    much of one time for the sample, with a small part of the memory.
    """

    pipeline_class = "WanPipeline"

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: unsupported settings.
        """
        ratio = pipeline.index().get("boundary_ratio")
        # The time, as a fraction of the network's range, from which the first of two transformers computes.
        self._boundary = None if ratio is None else float(ratio)
        super().__init__(pipeline, config)
        asked = {"cfg_scale_2": config.cfg_scale_2 is not None, "trained": config.trained != "both"}
        if self._boundary is None and any(asked.values()):
            field = next(name for name, wanted in asked.items() if wanted)
            raise ConfigError(f"model.{field}: {pipeline.path} has one transformer for all steps; leave it out")
        if config.cfg_scale_2 is not None and config.cfg_scale is None:
            raise ConfigError("model.cfg_scale_2: it needs model.cfg_scale; set that too, or leave it out")

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.pipeline.component_config("vae")["z_dim"])

    @property
    @override
    def compression(self) -> tuple[int, int]:
        vae = self.pipeline.component_config("vae")
        return int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))

    @property
    @override
    def patch_size(self) -> int:
        return int(self.transformer_config()["patch_size"][1])

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel

    @override
    def context_parallel_plan(self) -> dict[str, Any] | None:
        if self._boundary is not None:
            return None
        from diffusers import WanTransformer3DModel

        # Times of single tokens are Wan 2.2's.
        return {name: part for name, part in WanTransformer3DModel._cp_plan.items() if name}

    @override
    def with_exact_buffers(self, transformer: nn.Module) -> nn.Module:
        """Recomputes the tables of the rotary embedding, which are buffers here, in float32."""
        config = self.transformer_config()
        rope = transformer.get_submodule("rope")
        angles = rotary_angles(int(config["attention_head_dim"]), int(config["rope_max_seq_len"]))
        rope.freqs_cos = torch.from_numpy(np.cos(angles).astype(np.float32))
        rope.freqs_sin = torch.from_numpy(np.sin(angles).astype(np.float32))
        hold_buffers(rope)
        return transformer

    @override
    def trained_components(self) -> dict[str, str]:
        if self._boundary is None:
            return super().trained_components()
        return {"transformer.": "transformer", "transformer_2.": "transformer_2"}

    @override
    def trains(self, name: str) -> bool:
        return self._boundary is None or name.partition(".")[0] in self._trained

    @property
    def _trained(self) -> tuple[str, ...]:
        return TRAINED[self.config.trained]

    @override
    def build_transformer(self, config: ComponentConfig | None = None) -> nn.Module:
        built = super().build_transformer(config)
        # A process reward model's trunk is cut from the first transformer.
        if self._boundary is None or config is not None:
            return built
        return self._experts(built, super().build_transformer(self.pipeline.component_config("transformer_2")))

    @override
    def load_transformer(self, device: torch.device) -> nn.Module:
        loaded = super().load_transformer(device)
        if self._boundary is None:
            return loaded
        return self._experts(loaded, self._load_component("transformer_2", device)).eval()

    def _experts(self, high: nn.Module, low: nn.Module) -> nn.Module:
        from euphonium.generators.experts import Experts

        assert self._boundary is not None
        # Times are rounded to float32 on their way.
        return Experts(high, low, self._boundary * TIMESTEPS - 1e-3, self._trained)

    @override
    def guidance_scale(self, time: Tensor) -> float | Tensor:
        scale, second = self.config.cfg_scale, self.config.cfg_scale_2
        if self._boundary is None or second is None:
            return super().guidance_scale(time)
        assert scale is not None
        high = time * TIMESTEPS >= self._boundary * TIMESTEPS - 1e-3
        return torch.where(high, scale, second).view(-1, 1, 1, 1, 1)

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import WanPipeline

        from euphonium.generators.components import quiet

        # Of the other pipelines of Wan as well, which encode texts alike.
        left_out = dict.fromkeys(("transformer", "transformer_2", "vae"))
        with quiet():
            pipeline = WanPipeline.from_pretrained(self.folder, **left_out, dtype=self.dtype).to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            # The padding stays: Wan attends to it.
            hidden, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=device
            )
            return {"encoder_hidden_states": hidden.to(self.dtype)}

        return encode

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        """Always float32, which this VAE is meant to run in."""
        return WanVae.load(self.vae_class(), self.folder, device, torch.float32)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=x.to(self.dtype), timestep=time * TIMESTEPS, return_dict=False, **conditioning
        )[0]
        return output


class WanVae(VideoVae):
    """Wan's VAE, whose latents are ``(z - mean) / std`` of the network's ``z``, by channel."""

    @override
    def scaled(self, latents: Tensor) -> Tensor:
        return (latents - self._by_channel("latents_mean")) / self._by_channel("latents_std")

    @override
    def unscaled(self, latents: Tensor) -> Tensor:
        return latents * self._by_channel("latents_std") + self._by_channel("latents_mean")

    def _by_channel(self, name: str) -> Tensor:
        numbers = torch.tensor(getattr(self.network.config, name), device=self.device, dtype=self.dtype)
        return numbers.view(1, -1, 1, 1, 1)


def hold_buffers(module: nn.Module) -> None:
    """Makes a module's own buffers keep their type in casts of the module; they still move between devices."""

    class Holding(type(module)):  # type: ignore[misc]  # the base is known only at run time
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
            exact = dict(self.named_buffers(recurse=False))
            super()._apply(fn, recurse)
            for name, buffer in exact.items():
                setattr(self, name, buffer.to(getattr(self, name).device))
            return self

    module.__class__ = Holding


def rotary_angles(width: int, length: int) -> NDArray[np.float64]:
    """Angles ``[length, width]`` of a head's rotary embedding: channels of time, rows and columns, in pairs.

    Computed in numpy, because ``zero.Init`` rounds tensors that torch's constructors make.
    """
    side = 2 * (width // 6)
    frequencies = [10000.0 ** (-np.arange(0, part, 2) / part) for part in (width - 2 * side, side, side)]
    return np.outer(np.arange(length), np.concatenate(frequencies).repeat(2))

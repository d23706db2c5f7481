"""FLUX.2: text-to-image with states of three layers of a language model, Mistral's for dev and Qwen3 for klein."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.flux import PACK
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.images import ImageGenerator
from euphonium.generators.noise_grid import evenly_told
from euphonium.generators.vae import Autoencoder, ImageVae, VideoVae


class Flux2(ImageGenerator):
    """What the pipelines of FLUX.2 share.

    Their states are squares of the VAE's latents as channels, normalised by the VAE's own statistics.
    """

    block_fields: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: unsupported settings, or a negative prompt for a pipeline that takes none.
        """
        super().__init__(pipeline, config)
        if config.cfg_scale is not None and not self._takes_negative_prompt():
            raise ConfigError(
                f"model.cfg_scale: by its model_index.json {pipeline.path} is distilled, and its pipeline takes no "
                "negative prompt; leave it out"
            )

    @abstractmethod
    def _takes_negative_prompt(self) -> bool:
        """Whether classifier-free guidance fits the model."""

    @property
    @override
    def latent_channels(self) -> int:
        return PACK**2 * super().latent_channels

    @property
    @override
    def compression(self) -> tuple[int, int]:
        frames, side = super().compression
        return frames, PACK * side

    @override
    def told_sigmas(self, num_steps: int) -> NDArray[np.float64] | None:
        return evenly_told(self.pipeline, num_steps)

    @override
    def told_shift(self, num_steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        shift: float = compute_empirical_mu(image_seq_len=math.prod(self.latent_shape[2:]), num_steps=num_steps)
        return shift

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKLFlux2

        return AutoencoderKLFlux2

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        return Flux2Vae.load(self.vae_class(), self.folder, device, dtype)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning["encoder_hidden_states"]
        output: Tensor = transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(self.dtype),
            encoder_hidden_states=text,
            # Multiplied by the number of timesteps inside.
            timestep=time,
            guidance=self.guidance_input(x),
            img_ids=positions(1, *x.shape[3:], 1, device=x.device),
            txt_ids=positions(1, 1, 1, text.shape[1], device=x.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, x.shape[2:])


class Flux2Dev(Flux2):
    """Adapter of ``Flux2Pipeline``: FLUX.2 dev, whose network takes the scale of guidance as an input."""

    pipeline_class = "Flux2Pipeline"

    @override
    def _takes_negative_prompt(self) -> bool:
        return False

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import Flux2Pipeline
        from transformers import Mistral3ForConditionalGeneration

        tokenizer = self.load_tokenizer()
        encoder: nn.Module = Mistral3ForConditionalGeneration.from_pretrained(
            self.folder / "text_encoder", dtype=self.dtype
        )
        encoder = encoder.to(device).eval()
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            # The padding stays: attention reads it.
            hidden = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
                encoder, tokenizer, list(prompts), max_sequence_length=limit
            )
            return {"encoder_hidden_states": hidden.to(self.dtype)}

        return encode

    @override
    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        texts = []
        for conversation in format_input(list(prompts)):
            prompt = conversation[-1]["content"][0]["text"]
            texts.append(up_to(prompt, tokenizer.apply_chat_template(conversation, tokenize=False)))
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return [len(tokens) for tokens in encoded]


class Flux2Klein(Flux2):
    """Adapter of ``Flux2KleinPipeline``: FLUX.2 klein, distilled or with classifier-free guidance."""

    pipeline_class = "Flux2KleinPipeline"

    @override
    def _takes_negative_prompt(self) -> bool:
        return not self.pipeline.index().get("is_distilled")

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import Flux2KleinPipeline

        pipeline = Flux2KleinPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype)
        pipeline = pipeline.to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            # The padding stays: attention reads it.
            hidden, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=limit, device=device)
            return {"encoder_hidden_states": hidden.to(self.dtype)}

        return encode

    @override
    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        return super().token_counts(tokenizer, conversations(tokenizer, prompts, enable_thinking=False))


class Flux2Vae(ImageVae):
    """FLUX.2's VAE: its latents are squares of the network's as channels, normalised as its batch norm does."""

    @override
    def scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    @override
    def unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.network.bn
        deviation = (norm.running_var + self.network.config.batch_norm_eps).sqrt()
        shape = (1, -1, 1, 1, 1)
        return norm.running_mean.to(latents).view(shape), deviation.to(latents).view(shape)

    @override
    def _encode(self, pixels: Tensor) -> Tensor:
        squares = super()._encode(pixels).unflatten(4, (-1, PACK)).unflatten(3, (-1, PACK))
        return squares.permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)

    @override
    def _decode(self, latents: Tensor) -> Tensor:
        squares = latents.unflatten(1, (-1, PACK, PACK)).permute(0, 1, 4, 5, 2, 6, 3)
        return super()._decode(squares.flatten(5, 6).flatten(3, 4))


def positions(*sizes: int, device: torch.device) -> Tensor:
    """Coordinates ``[product of the sizes, sizes]`` of all places of a grid, the last one running fastest."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).to(device)


def conversations(tokenizer: Any, prompts: Sequence[str], *, enable_thinking: bool) -> list[str]:
    """Prompts in the conversation in which Qwen3 reads them, up to their ends: what is behind them is cut first."""
    texts = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        whole = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
        texts.append(up_to(prompt, whole))
    return texts


def up_to(prompt: str, conversation: str) -> str:
    """A conversation up to the end of the prompt in it."""
    return conversation[: conversation.rindex(prompt) + len(prompt)]

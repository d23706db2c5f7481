"""MiniMax-H3: text to video with sound, both denoised by one transformer, with states of Qwen3-VL for the prompt.

Video and sound walk levels of their own, ``sigma`` and ``sigma_s``: the same uniform grid under two time shifts ``s``
and ``s_s``. So ``sigma_s / (1 - sigma_s) = r sigma / (1 - sigma)`` with ``r = s_s / s`` at every step, and the sound
``y = (1 - sigma_s) y0 + sigma_s eps`` is, but for a factor, a state at the video's own level::

    (sigma / sigma_s) y = (1 - sigma) (y0 / r) + sigma eps

States hold the sound so. Its noise is standard normal, its data is ``y0 / r``, and samplers, likelihoods and objectives
treat video and sound alike, with nothing left out and nothing approximated. Euler's step of this state is Euler's step
of the sound on its own levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder, padded_texts, seen_texts
from euphonium.generators.folder import OF_OTHER_TASKS, PipelineFolder
from euphonium.generators.generator import Generator
from euphonium.generators.noise_grid import SCHEDULER_FILE, scheduler_config
from euphonium.generators.sound import Sound, SoundDecoder
from euphonium.generators.vae import Autoencoder, VideoVae
from euphonium.generators.wan import WanVae, hold_buffers

# Frames of the video and latents of the sound a second, and channels of the sound.
FRAME_RATE, SOUND_RATE, SOUND_CHANNELS = 24, 40, 2
# Which of the text encoder's states the transformer reads, before that encoder's last norm.
TEXT_LAYER = 50
# Mean and standard deviation of the VAE's pixels, by channel: those of ImageNet.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MiniMaxH3(Generator):
    """Adapter of ``MiniMaxH3ModularPipeline`` for its task T2VA.

    A state ``[channels, 1, 1, places]`` holds the tokens of the video and behind them those of the sound, each in as
    many places as it has times ``channels`` numbers.
    """

    pipeline_class = "MiniMaxH3ModularPipeline"
    least_frames = 22
    # The processor prepares pictures and sounds.
    unopened = ("processor", *OF_OTHER_TASKS)

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: unsupported settings.
        """
        super().__init__(pipeline, config)
        if config.cfg_scale is not None:
            raise ConfigError(
                f"model.cfg_scale: {pipeline.path} is distilled, and its pipeline takes no negative prompt; leave it "
                "out"
            )
        layers = int(pipeline.component_config("text_encoder")["text_config"]["num_hidden_layers"])
        if layers <= TEXT_LAYER:
            raise ConfigError(
                f"model.path: the transformer reads what layer {TEXT_LAYER} of the text encoder hands on to the next, "
                f"and by its config.json the text_encoder of {pipeline.path} has {layers}; download or copy it again"
            )
        sound = pipeline.component_config("audio_scheduler", SCHEDULER_FILE)
        # r: the shift of the sound's levels, relative to the video's.
        self._ratio = float(sound["shift"]) / float(scheduler_config(pipeline)["shift"])
        # The packing of the latest pass.
        self._packing: Any = None

    @property
    def layout(self) -> Layout:
        """How a sample's tokens lie in a state."""
        vae, transformer = self.pipeline.component_config("vae"), self.transformer_config()
        _, rows, columns = transformer["patch_size"]
        clip, latents, left = _chunk(vae)
        side = prod(vae["spatial_downsample_factors"])
        return Layout(
            channels=int(vae["latent_channels"]),
            frames=(self.config.frames - latents) // clip * latents + left,
            height=self.config.height // side,
            width=self.config.width // side,
            patch=(int(rows), int(columns)),
            sound_channels=int(transformer["audio_in_channels"]),
            sound_length=round(self.config.frames / FRAME_RATE * SOUND_RATE),
        )

    @property
    @override
    def latent_channels(self) -> int:
        return self.layout.places[0]

    @property
    @override
    def compression(self) -> tuple[int, int]:
        vae = self.pipeline.component_config("vae")
        return prod(vae["temporal_downsample_factors"]), prod(vae["spatial_downsample_factors"])

    @property
    @override
    def patch_size(self) -> int:
        return int(self.transformer_config()["patch_size"][-1])

    @property
    @override
    def latent_shape(self) -> tuple[int, ...]:
        channels, video, sound = self.layout.places
        return channels, 1, 1, video + sound

    @override
    def shared_tokens(self) -> dict[str, int]:
        return {"tokens of a sample": self.layout.tokens}

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import MiniMaxH3Transformer3DModel

        return MiniMaxH3Transformer3DModel

    @override
    def prepare(self, transformer: nn.Module) -> nn.Module:
        """Makes samples that are packed in one sequence attend to themselves."""
        from euphonium.generators.packed import PackedAttention, Packing

        network: Any = transformer
        network.packing = Packing()
        network.set_attn_processor(PackedAttention(network.packing))
        return transformer

    @override
    def with_exact_buffers(self, transformer: nn.Module) -> nn.Module:
        """Recomputes the frequencies of the rotary embedding, in float32."""
        config = self.transformer_config()
        number = int(config["rope_freq_dim"])
        rope = transformer.get_submodule("rope")
        frequencies = float(config["rope_theta"]) ** -(np.arange(number) / number)
        rope.inv_freq = torch.from_numpy(frequencies.astype(np.float32))
        hold_buffers(rope)
        return transformer

    @override
    def token_width(self) -> int:
        return int(self.transformer_config()["hidden_size"])

    @override
    def sample_tokens(self, tokens: Tensor) -> Tensor:
        from euphonium.generators.packed import parts

        # Those of the prompt are in front of the sample's own.
        return torch.cat([part[:, -self.layout.tokens :] for part in parts(tokens, self._packing.samples)])

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from transformers import Qwen3VLForConditionalGeneration

        tokenizer = self.load_tokenizer()
        whole = Qwen3VLForConditionalGeneration.from_pretrained(self.folder / "text_encoder", dtype=self.dtype)
        encoder = whole.model.language_model.to(device).eval()
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            texts = []
            for prompt in prompts:
                tokens = tokenizer(prompt, add_special_tokens=False, truncation=True, max_length=limit)["input_ids"]
                states = encoder(torch.tensor([tokens], device=device), output_hidden_states=True, use_cache=False)
                texts.append(states.hidden_states[TEXT_LAYER][0])
            return padded_texts(texts, self.dtype)

        return encode

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKLMiniMaxH3

        return AutoencoderKLMiniMaxH3

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        vae = MiniMaxH3Vae.load(self.vae_class(), self.folder, device, dtype)
        vae.layout = self.layout
        return vae

    @override
    def load_sound_decoder(self, device: torch.device) -> SoundDecoder:
        from diffusers import AutoencoderKLMiniMaxH3Audio

        vae = AutoencoderKLMiniMaxH3Audio.from_pretrained(self.folder / "audio_vae", dtype=self.dtype).to(device).eval()
        mean, std = (
            torch.tensor(numbers, device=device).view(1, -1, 1)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )

        @torch.no_grad()
        def decode(latents: Tensor) -> Sound:
            # Finished states hold the sound over the ratio of the shifts; its two channels are decoded one by one.
            tokens = self._ratio * self.layout.tokens_of(latents.to(device))[1]
            channels = tokens[0].unflatten(0, (SOUND_CHANNELS, -1)).transpose(1, 2) * std + mean
            waves = vae.decode(channels.to(vae.dtype), return_dict=False)[0]
            return Sound(waves[:, 0].float().cpu(), int(vae.config.sampling_rate))

        return decode

    def states(self, video: Tensor, sound: Tensor) -> Tensor:
        """States of tokens of the video ``[batch, tokens, width]`` and, as states hold it, of the sound."""
        channels = self.latent_channels
        places = [tokens.reshape(len(tokens), -1, channels) for tokens in (video, sound)]
        return torch.cat(places, dim=1).transpose(1, 2)[:, :, None, None]

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        layout, texts = self.layout, seen_texts(conditioning)
        lengths = [len(text) for text in texts]
        sigma = time.view(-1, 1, 1)
        # sigma / sigma_s, which is 1 at pure noise.
        scale = sigma + (1 - sigma) / self._ratio
        video, sound = layout.tokens_of(x)
        sound, sound_sigma = sound / scale, sigma / scale
        self._packing = transformer.packing
        self._packing.set(lengths, layout.tokens)
        outputs = transformer(
            hidden_states=video.flatten(0, 1).unsqueeze(0),
            audio_hidden_states=sound.flatten(0, 1).unsqueeze(0),
            encoder_hidden_states=torch.cat(texts).unsqueeze(0),
            # The network's time is that of the data.
            timestep=1 - torch.stack([time, sound_sigma.flatten()], dim=1).flatten(),
            **_rows(layout, lengths, x.device),
            return_dict=False,
        )
        # It predicts the way to the data.
        to_noise, of_sound = (-output.float().view(len(x), -1, output.shape[-1]) for output in outputs)
        data, noise = sound - sound_sigma * of_sound, sound + (1 - sound_sigma) * of_sound
        return self.states(to_noise, noise - data / self._ratio)

    @override
    def _check_size(self) -> None:
        step = self.compression[1] * self.patch_size
        clip, latents, _ = _chunk(self.pipeline.component_config("vae"))
        frames, least = self.config.frames, self.least_frames
        if frames < least or frames % clip != latents:
            near = max(frames - frames % clip + latents, least)
            raise ConfigError(
                f"model.frames: {self.folder} makes {least} frames and {clip} more any number of times; {frames} is "
                f"not among those numbers, {near} is"
            )
        self._check_sides(step)


class Layout(NamedTuple):
    """What a sample is made of.

    Attributes:
        channels: of the video's latents.
        frames: latent frames of the video.
        height: of its latents.
        width: of its latents.
        patch: rows and columns of latents in a token.
        sound_channels: of the latents of each channel of the sound.
        sound_length: latents of each channel of the sound.
    """

    channels: int
    frames: int
    height: int
    width: int
    patch: tuple[int, int]
    sound_channels: int
    sound_length: int

    @property
    def video_tokens(self) -> int:
        """Tokens of the video."""
        return self.frames * (self.height // self.patch[0]) * (self.width // self.patch[1])

    @property
    def tokens(self) -> int:
        """Tokens of video and sound."""
        return self.video_tokens + SOUND_CHANNELS * self.sound_length

    @property
    def places(self) -> tuple[int, int, int]:
        """Channels of a state, and the places in it that video and sound take."""
        width = self.channels * prod(self.patch)
        channels = gcd(width, self.sound_channels)
        sound = SOUND_CHANNELS * self.sound_length * self.sound_channels // channels
        return channels, self.video_tokens * width // channels, sound

    def tokens_of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, tokens, width]`` of video and sound in states ``[batch, channels, 1, 1, places]``."""
        _, video, sound = self.places
        packed = states.flatten(2).transpose(1, 2).split([video, sound], dim=1)
        counts = (self.video_tokens, SOUND_CHANNELS * self.sound_length)
        one, other = (part.reshape(len(states), count, -1) for part, count in zip(packed, counts, strict=True))
        return one, other

    def latents_of(self, video: Tensor) -> Tensor:
        """Latents ``[batch, channels, frames, height, width]`` of the video's tokens."""
        (rows, columns), grid = self.patch, (self.height // self.patch[0], self.width // self.patch[1])
        parts = video.unflatten(2, (self.channels, rows, columns)).unflatten(1, (self.frames, *grid))
        return parts.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def _chunk(vae: dict[str, Any]) -> tuple[int, int, int]:
    """Frames that the VAE encodes at a time, the latent frames of them, and how many of the last ones are kept."""
    clip, frames = int(vae["clip_length"]), prod(vae["temporal_downsample_factors"])
    latents = -(-clip // frames)
    return clip, latents, latents - int(vae["token_drop"])


def _rows(layout: Layout, lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """The network's arguments that say what the tokens of a packed batch are, and which of its times they have."""
    found: dict[str, list[Tensor]] = {}
    begin = 0
    for sample, length in enumerate(lengths):
        for name, rows in _sample_rows(layout, length).items():
            if name.endswith("_indices"):
                rows = rows + (2 * sample if name == "timestep_indices" else begin)
            found.setdefault(name, []).append(rows)
        begin += length + layout.tokens
    return {name: torch.cat(rows).to(device) for name, rows in found.items()}


@lru_cache(maxsize=64)
def _sample_rows(layout: Layout, length: int) -> dict[str, Tensor]:
    """The same for one sample whose prompt has ``length`` tokens, on the CPU."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
    from diffusers.modular_pipelines.minimax_h3.modular_pipeline import (
        MINIMAX_H3_AUDIO_TAG,
        MINIMAX_H3_TEXT_TAG,
        MINIMAX_H3_VIDEO_TAG,
    )

    with torch.device("cpu"):
        positions, tags, video, sound, text, _, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            torch.full((length,), MINIMAX_H3_TEXT_TAG), layout.frames, layout.height, layout.width, layout.sound_length,
            (1, *layout.patch), SOUND_CHANNELS, MINIMAX_H3_AUDIO_TAG, MINIMAX_H3_VIDEO_TAG,
        )  # fmt: skip
    return {
        # The rotary embedding rounds them so.
        "position_ids": positions.float(),
        "token_tags": tags,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
        # The first time is the video's, and the text's.
        "timestep_indices": (tags == MINIMAX_H3_AUDIO_TAG).long(),
    }


class MiniMaxH3Vae(WanVae):
    """The VAE of the video; states are as the generator's."""

    layout: Layout

    @override
    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Raises ConfigError: a file of a video alone makes no state."""
        raise ConfigError(
            "videos of files have no latents of the sound that a MiniMaxH3ModularPipeline makes with its own; give "
            "samples that it has drawn"
        )

    @override
    def decode(self, latents: Tensor) -> Tensor:
        video, _ = self.layout.tokens_of(latents)
        return super().decode(self.layout.latents_of(video))

    @override
    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(numbers, device=self.device).view(1, -1, 1, 1, 1) for numbers in (PIXEL_MEAN, PIXEL_STD)
        )
        return 2 * (super()._decode(latents).float() * std + mean) - 1

"""LTX-2 and LTX-2.3: video and sound from text, by one network that moves both at once.

A state is one tensor that holds the tokens of the clip and, behind them, those of its sound. The pipeline walks both on
the same noise levels, so that samplers, likelihoods and objectives take them as one sample: the sound is a part of the
action. Rewards see the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.ltx import TIMESTEPS, Ltx, LtxVae
from euphonium.generators.sound import Sound, SoundDecoder
from euphonium.generators.vae import Autoencoder, VideoVae

# Frames a second, of which the length of the sound follows: the pipeline's default.
FRAME_RATE = 24.0
# Columns of a spectrogram to a latent of the sound: a constant of the audio VAE's class.
AUDIO_COMPRESSION = 4
# Tokens that the pipeline brings every prompt to.
PIPELINE_TOKENS = 1024


class Layout(NamedTuple):
    """Where a state holds the clip and where its sound.

    Attributes:
        video: latent frames, rows and columns of the clip.
        sound: latents of the sound, one after another in time.
    """

    video: tuple[int, int, int]
    sound: int

    @property
    def tokens(self) -> int:
        """Tokens of a state."""
        return prod(self.video) + self.sound

    def join(self, video: Tensor, sound: Tensor) -> Tensor:
        """The states ``[batch, channels, 1, 1, tokens]`` of clips and their sound.

        Args:
            video: ``[batch, channels, frames, rows, columns]``.
            sound: ``[batch, channels, latents]``, the channels of all mel bins in one.
        """
        return torch.cat([video.flatten(2), sound], dim=2)[:, :, None, None]

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`join`."""
        video, sound = states.flatten(2).split([prod(self.video), self.sound], dim=2)
        return video.unflatten(2, self.video), sound


class Ltx2(Ltx):
    """Adapter of ``LTX2Pipeline``."""

    pipeline_class = "LTX2Pipeline"
    text_networks = ("text_encoder", "connectors")
    # What rewrites prompts, and what chooses a clip's length by its prompt.
    unopened = ("processor", "prompt_enhancer", "duration_head")

    @property
    def layout(self) -> Layout:
        """Where a sample's state holds its clip and its sound."""
        audio, seconds = self.pipeline.component_config("audio_vae"), self.config.frames / FRAME_RATE
        rate = audio["sample_rate"] / audio["mel_hop_length"] / AUDIO_COMPRESSION
        _, frames, height, width = super().latent_shape
        return Layout((frames, height, width), round(seconds * rate))

    @property
    @override
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's state ``[channels, 1, 1, tokens]``; see :class:`Layout`."""
        return (self.latent_channels, 1, 1, self.layout.tokens)

    @override
    def shifting_tokens(self) -> int:
        return prod(self.layout.video)

    @override
    def transformer_class(self) -> NetworkClass:
        from diffusers import LTX2VideoTransformer3DModel

        return LTX2VideoTransformer3DModel

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        from diffusers import LTX2Pipeline

        others = dict.fromkeys(("transformer", "vae", "audio_vae", "vocoder", *self.unopened))
        pipeline = LTX2Pipeline.from_pretrained(self.folder, dtype=self.dtype, **others).to(device)
        limit = self.config.max_prompt_tokens

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, mask, _, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=device
            )
            # The connectors put learnt tokens in the place of padding, and their mask hides nothing.
            video, audio, _ = pipeline.connectors(hidden, mask, padding_side=pipeline.tokenizer.padding_side)
            return {
                "encoder_hidden_states": video.to(self.dtype),
                "audio_encoder_hidden_states": audio.to(self.dtype),
            }

        return encode

    def text_widths(self) -> tuple[int, int]:
        """Widths of the states of a prompt that the video's tokens attend to, and of those that the sound's do."""
        config = self.transformer_config()
        if config.get("use_prompt_embeddings", True):
            return int(config["caption_channels"]), int(config["caption_channels"])
        return int(config["cross_attention_dim"]), int(config["audio_cross_attention_dim"])

    @override
    def vae_class(self) -> Autoencoder:
        from diffusers import AutoencoderKLLTX2Video

        return AutoencoderKLLTX2Video

    @override
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        plain = LtxVae.load(self.vae_class(), self.folder, device, dtype)
        return Ltx2Vae(plain.network, device, dtype, self.layout)

    @override
    def load_sound_decoder(self, device: torch.device) -> SoundDecoder:
        from diffusers import LTX2Pipeline

        others = ("transformer", "vae", "text_encoder", "tokenizer", "connectors", *self.unopened)
        pipeline = LTX2Pipeline.from_pretrained(self.folder, dtype=self.dtype, **dict.fromkeys(others)).to(device)
        vae, vocoder, layout = pipeline.audio_vae, pipeline.vocoder, self.layout
        # Channels of a latent, which holds them for each of its bins of pitch.
        bins = self.latent_channels // int(vae.config.latent_channels)

        @torch.no_grad()
        def decode(latents: Tensor) -> Sound:
            tokens = layout.split(latents.to(device))[1].transpose(1, 2)
            tokens = pipeline._denormalize_audio_latents(tokens, vae.latents_mean, vae.latents_std)
            spectra = pipeline._unpack_audio_latents(tokens, layout.sound, num_mel_bins=bins).to(vae.dtype)
            waves = vocoder(vae.decode(spectra, return_dict=False)[0])
            return Sound(waves[0].float().cpu(), int(vocoder.config.output_sampling_rate))

        return decode

    @override
    def fingerprint(self) -> dict[str, str]:
        return super().fingerprint() | {part: self.pipeline.fingerprint(part) for part in ("audio_vae", "connectors")}

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        (frames, height, width), sound = self.layout
        tokens = x.flatten(2).transpose(1, 2).to(self.dtype)
        # Of rows that lie apart torch multiplies in another way where weights are trained, and the last bit differs.
        video, audio = (part.contiguous() for part in tokens.split([frames * height * width, sound], dim=1))
        outputs: tuple[Tensor, Tensor] = transformer(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            audio_encoder_hidden_states=conditioning["audio_encoder_hidden_states"],
            timestep=time * TIMESTEPS,
            sigma=time * TIMESTEPS,
            num_frames=frames,
            height=height,
            width=width,
            fps=FRAME_RATE,
            audio_num_frames=sound,
            use_cross_timestep=True,
            return_dict=False,
        )
        return torch.cat(outputs, dim=1).transpose(1, 2)[:, :, None, None]

    @override
    def _check_size(self) -> None:
        super()._check_size()
        network, connectors = self.transformer_config(), self.pipeline.component_config("connectors")
        channels = (network["in_channels"], network["audio_in_channels"])
        if channels != (self.latent_channels,) * 2:
            raise ConfigError(
                f"model.path: the transformer of {self.folder} takes {channels[0]} channels of video and {channels[1]} "
                f"of sound, and its VAE makes {self.latent_channels}; samples need one number for all, as in the "
                "published models"
            )
        of_each = [connectors.get(f"{part}_connector_num_learnable_registers") or 1 for part in ("video", "audio")]
        limit, step = self.config.max_prompt_tokens, lcm(*of_each)
        if limit % step:
            raise ConfigError(
                f"model.max_prompt_tokens: {self.folder} fills prompts up with {step} learnt tokens, of which {limit} "
                f"is no multiple; set {PIPELINE_TOKENS}, as its pipeline does"
            )


class Ltx2Vae(LtxVae):
    """LTX-2's VAE of video, whose latents are states of the generator.

    Videos have no sound here: in the states of :meth:`encode` it is 0, the mean of the audio VAE's latents, and
    :meth:`decode` leaves it out.
    """

    def __init__(self, network: Autoencoder, device: torch.device, dtype: torch.dtype, layout: Layout) -> None:
        super().__init__(network, device, dtype)
        self.layout = layout

    @override
    def encode(self, videos: Tensor) -> Tensor:
        video = super().encode(videos)
        return self.layout.join(video, video.new_zeros(*video.shape[:2], self.layout.sound))

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(self.layout.split(latents)[0])

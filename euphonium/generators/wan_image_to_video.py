"""Wan image-to-video: Wan 2.1 I2V, which also reads CLIP's view of the picture, and Wan 2.2 TI2V with a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import IMAGE, Conditioning, ImageEncoder, cast, expand
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.pictures import open_picture
from euphonium.generators.wan import TIMESTEPS, Wan

# Entry with CLIP's states of the picture; the name is the transformer's argument.
VIEW = "encoder_hidden_states_image"
# The attention of diffusers takes what is in front of so many tokens of text for the picture's.
TEXT_TOKENS = 512


class WanImageToVideo(Wan):
    """Adapter of ``WanImageToVideoPipeline``, for models with one transformer.

    Wan 2.1: the transformer's input is the state, a mask of the frames that are given, and the latents of a video of
    the picture and gray frames; attention reads CLIP's states of the picture beside the text.

    Wan 2.2 TI2V: the picture's latents take the place of the state's first frame, whose tokens are told the time 0. The
    walk of that frame moves straight to the picture, whatever the policy does, so it earns no gradient.
    """

    pipeline_class = "WanImageToVideoPipeline"
    also_opens = ("WanPipeline",)
    takes_image = True
    image_components = ("image_encoder", "image_processor")

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: unsupported settings, or a transformer that takes no picture.
        """
        self._first_is_given = bool(pipeline.index().get("expand_timesteps"))
        super().__init__(pipeline, config)
        taken = int(self.transformer_config()["in_channels"])
        if not self._first_is_given and taken != self._frame_channels + 2 * self.latent_channels:
            raise ConfigError(
                f"model.pipeline: the transformer of {self.folder} has {taken} input channels, and none for a picture; "
                "leave it out, or give model.path an image-to-video model"
            )
        if self._views and config.max_prompt_tokens != TEXT_TOKENS:
            raise ConfigError(
                f"model.max_prompt_tokens: set it to {TEXT_TOKENS}; of texts of another length the transformer of "
                f"{self.folder} would take words for parts of the picture"
            )

    @property
    def _frame_channels(self) -> int:
        """Channels of the mask: frames that a latent stands for."""
        return self.compression[0]

    @property
    def _views(self) -> bool:
        """Whether the transformer reads CLIP's states of the picture."""
        return self.transformer_config().get("image_dim") is not None

    @override
    def context_parallel_plan(self) -> dict[str, Any] | None:
        return None

    @override
    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        channels, frames, height, width = self.latent_shape
        shapes: dict[str, tuple[int, ...]] = {IMAGE: (channels, 1 if self._first_is_given else frames, height, width)}
        if self._views:
            vision = self.pipeline.component_config("image_encoder")
            tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
            shapes[VIEW] = (tokens, int(vision["hidden_size"]))
        return shapes

    @override
    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        from diffusers.video_processor import VideoProcessor

        vae = self.load_working_vae(device)
        processor = VideoProcessor(vae_scale_factor=self.compression[1], do_normalize=False)
        size = {"height": self.config.height, "width": self.config.width}
        following = 0 if self._first_is_given else self.config.frames - 1
        view = self._load_view(device) if self._views else None

        def encode(files: Sequence[Path]) -> Conditioning:
            pictures = [open_picture(file) for file in files]
            latents = []
            for picture in pictures:
                first = processor.preprocess(picture, **size).unsqueeze(1)
                # Middle gray is the 0 of the VAE's pixels.
                gray = torch.full_like(first, 0.5).expand(-1, following, -1, -1, -1)
                latents.append(vae.encode(torch.cat([first, gray], dim=1)))
            entries = {IMAGE: torch.cat(latents)}
            if view is not None:
                entries[VIEW] = torch.cat([view(picture) for picture in pictures])
            return cast(entries, self.dtype)

        return encode

    def _load_view(self, device: torch.device) -> Callable[[Image.Image], Tensor]:
        """CLIP's last states but one of a picture, ``[1, tokens, width]``; in float32, in which it is published."""
        from euphonium.generators.components import component_classes

        classes = component_classes(self.pipeline)
        encoder, processor = (classes[name].from_pretrained(self.folder / name) for name in self.image_components)
        encoder = encoder.float().to(device).eval()

        @torch.no_grad()
        def view(picture: Image.Image) -> Tensor:
            pixels = processor(images=picture, return_tensors="pt").to(device)
            states: Tensor = encoder(**pixels, output_hidden_states=True).hidden_states[-2]
            return states

        return view

    @override
    def finish(self, samples: Tensor, conditioning: Conditioning) -> Tensor:
        if not self._first_is_given:
            return samples
        first = expand({IMAGE: conditioning[IMAGE]}, len(samples))[IMAGE].to(samples)
        return torch.cat([first, samples[:, :, 1:]], dim=2)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        arguments: dict[str, Tensor] = dict(conditioning)
        image = arguments.pop(IMAGE).to(x.dtype)
        if self._first_is_given:
            return self._after_first(transformer, x, time, image, arguments)
        mask = x.new_zeros(x.shape[0], self._frame_channels, *x.shape[2:])
        mask[:, :, 0] = 1
        output: Tensor = transformer(
            hidden_states=torch.cat([x, mask, image], dim=1).to(self.dtype),
            timestep=time * TIMESTEPS,
            return_dict=False,
            **arguments,
        )[0]
        return output

    def _after_first(
        self, transformer: nn.Module, x: Tensor, time: Tensor, first: Tensor, arguments: dict[str, Tensor]
    ) -> Tensor:
        """The velocity of a video whose first frame is given: its own is that of the straight line to it."""
        tokens = x.shape[3] // self.patch_size * (x.shape[4] // self.patch_size)
        times = (time * TIMESTEPS).unsqueeze(1).repeat(1, x.shape[2] * tokens)
        times[:, :tokens] = 0
        output: Tensor = transformer(
            hidden_states=torch.cat([first, x[:, :, 1:]], dim=2).to(self.dtype),
            timestep=times,
            return_dict=False,
            **arguments,
        )[0]
        # A process reward model may ask at the time 0.
        straight = (x[:, :, :1] - first) / time.clamp_min(1 / TIMESTEPS).view(-1, 1, 1, 1, 1)
        return torch.cat([straight, output[:, :, 1:].to(x.dtype)], dim=2)

"""What the roles need of a generator: one small class per diffusers pipeline adapts it.

A generator is cheap: it reads configuration files only. Each role loads the parts that it needs: rollout actors the
transformer and the text encoders, outcome-reward servers the VAE, learners the transformer alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from euphonium.config import GuidanceConfig, ModelConfig, PromptsConfig, SamplerConfig
from euphonium.dynamics import StepTable, shifted_sigmas
from euphonium.errors import ConfigError
from euphonium.generators.backbone import Backbone
from euphonium.generators.conditioning import (
    Conditioning,
    ImageEncoder,
    PromptEncoder,
    guided,
    negative,
    positive,
    with_first_frames,
    with_negative_prompt,
)
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.vae import VideoVae
from euphonium.prompt_files import prompt_images

Decoder = Callable[[Tensor], Tensor]


class Generator(Backbone):
    """One generator, as its pipeline's adapter: how its network is fed, and what comes out of it.

    Adapters give the abstract members here and in :class:`euphonium.generators.backbone.Backbone`; everything else
    follows from them.
    """

    pipeline_class: ClassVar[str]
    # Whether every prompt comes with a picture (image-to-video).
    takes_image: ClassVar[bool] = False

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: a size or a guidance that this generator cannot take.
        """
        super().__init__(pipeline, config)
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
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """Text tokenizers and encoders as one function from prompts to conditioning."""

    @abstractmethod
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        """The VAE, in a type of the caller's choice where it can compute in several, without memory savers."""

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
        return guided(output, self.network(transformer, x, time, negative(conditioning)), self.config.cfg_scale)

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
        if self.config.cfg_scale is not None:
            encode = with_negative_prompt(encode, self.config.negative_prompt)
        if not self.takes_image:
            return encode
        pictures = images or {}

        def image_of(prompt: str) -> Path:
            if prompt not in pictures:
                raise ConfigError(
                    f"prompts: {prompt!r} has no image, which {self.pipeline_class} begins its video with; give "
                    'prompts in .jsonl files, one {"prompt": ..., "image": ...} a line'
                )
            return pictures[prompt]

        return with_first_frames(encode, self.load_image_encoder(device), image_of)

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """The VAE as a function from pictures to latents, in families that take an image.

        Raises:
            ConfigError: this one takes none.
        """
        raise ConfigError(
            f"model.path: {self.folder} is a {self.pipeline_class}, which takes no image; for image-to-video give a "
            "pipeline that does, such as a HunyuanSkyreelsImageToVideoPipeline"
        )

    def load_working_vae(self, device: torch.device) -> VideoVae:
        """The VAE as a run uses it: in ``model.dtype``, with the memory savers of the recipe.

        Raises:
            ConfigError: it has no memory saver of that kind.
        """
        vae = self.load_vae(device, self.dtype)
        return vae.saving_memory(tiling=self.config.vae_tiling, slicing=self.config.vae_slicing)

    def load_decoder(self, device: torch.device) -> Decoder:
        """The VAE as a function from latents to videos ``[batch, frames, 3, height, width]`` in [0, 1]."""
        return self.load_working_vae(device).decode

    def fingerprint(self) -> dict[str, str]:
        """Marks of the latent space and of the text embeddings, which a process reward model is tied to."""
        parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        return {part: self.pipeline.fingerprint(part) for part in parts if (self.folder / part).is_dir()}

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


def images_for(generator: Generator, prompts: PromptsConfig) -> dict[str, Path]:
    """The pictures of a run's prompts, if its generator takes any.

    Raises:
        ConfigError: see :func:`euphonium.prompt_files.prompt_images`.
    """
    return prompt_images([prompts.train, prompts.evaluation]) if generator.takes_image else {}

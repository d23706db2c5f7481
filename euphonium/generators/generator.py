"""The interface of a generator: what the roles need of a diffusers pipeline, which one small class a family adapts.

A generator itself is cheap: it reads only configuration files. Each role loads the parts that it needs: rollout actors
the transformer and the text encoders, ORM servers the VAE, learners the transformer alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from euphonium.config import GuidanceConfig, ModelConfig, NoiseGridConfig, PromptsConfig, SamplerConfig
from euphonium.dynamics import StepTable, StepTableError, shifted_sigmas
from euphonium.errors import ConfigError
from euphonium.generators.backbone import Backbone
from euphonium.generators.conditioning import (
    IMAGE,
    Conditioning,
    ImageEncoder,
    PromptEncoder,
    cast,
    guided,
    negative,
    positive,
    stack_conditionings,
    with_negative_prompt,
    with_pictures,
)
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.noise_grid import NoiseGrid, pipeline_grid
from euphonium.generators.sound import SoundDecoder
from euphonium.generators.vae import Autoencoder, VideoVae
from euphonium.prompt_files import prompt_images

Decoder = Callable[[Tensor], Tensor]


class Generator(Backbone):
    """Adapter of one diffusers pipeline.

    Subclasses implement the abstract members here and in :class:`euphonium.generators.backbone.Backbone`; everything
    else follows from them.
    """

    pipeline_class: ClassVar[str]
    # Classes of model_index.json whose folders are opened as well if ``model.pipeline`` says so.
    also_opens: ClassVar[tuple[str, ...]] = ()
    # Frames of the shortest sample.
    least_frames: ClassVar[int] = 1
    # Whether every prompt comes with a picture.
    takes_image: ClassVar[bool] = False
    # Whether the text encoder reads a prompt together with its picture, so that no text is encoded before a run.
    reads_text_with_image: ClassVar[bool] = False
    # Components that read the picture, besides the VAE; those that the folder does not have are left out.
    image_components: ClassVar[tuple[str, ...]] = ()
    # What the names of the components that read prompts begin with, tokenizers apart.
    text_networks: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # Further components that no role opens.
    unopened: ClassVar[tuple[str, ...]] = ()
    # The tokenizer whose encoder reads the whole of a prompt; others may read its beginning.
    prompt_tokenizer: ClassVar[str] = "tokenizer"

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: this generator does not support the size or guidance in ``config``.
        """
        super().__init__(pipeline, config)
        self._check_size()
        self._check_guidance()
        self._check_attention()

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """Compression of the VAE in time and in space: frames, and pixels a side, per latent; 0 frames for images."""

    @property
    def patch_size(self) -> int:
        """Side of a transformer token, in latents."""
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

    def shared_tokens(self) -> dict[str, int]:
        """Tokens of a sample that ranks share evenly in sequence parallelism, by what they are."""
        _, frames, height, width = self.latent_shape
        return {"tokens of a sample": frames * (height // self.patch_size) * (width // self.patch_size)}

    @abstractmethod
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """Loads tokenizers and text encoders, as one function from prompts to a conditioning."""

    def load_tokenizer(self) -> Any:
        """The tokenizer whose encoder reads the whole of a prompt, of the class that the pipeline names."""
        from euphonium.generators.components import component_classes

        kind = component_classes(self.pipeline)[self.prompt_tokenizer]
        return kind.from_pretrained(self.folder / self.prompt_tokenizer)

    def token_counts(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, as many as it has, by the tokenizer of :meth:`load_tokenizer`."""
        # Not verbose: longer prompts than the tokenizer was made for are what is looked for.
        return [len(tokens) for tokens in tokenizer(list(prompts), verbose=False).input_ids]

    def token_limit(self, tokenizer: Any) -> int:
        """Tokens to which the encoder of :meth:`load_tokenizer` cuts a prompt."""
        return self.config.max_prompt_tokens

    @abstractmethod
    def vae_class(self) -> Autoencoder:
        """The diffusers class of the VAE."""

    @abstractmethod
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoVae:
        """Loads the VAE in ``dtype``, where it can compute in several types, without memory savers."""

    def network(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward pass of the network, without classifier-free guidance.

        Every role passes here, and here alone the conditioning gets the type that the network computes in.

        Args:
            transformer: a transformer of this family.
            x: float32 states ``[batch, *latent_shape]``.
            time: float32 ``[batch]``, as a fraction of the network's range
                (:attr:`euphonium.dynamics.StepTable.times`); the noise fraction in flow matching.
            conditioning: conditioning of the same batch size, of any floating type, without entries of the negative
                prompt.

        Returns:
            float32, like ``x``: the velocity ``eps - x0``, or the noise for models that predict it.
        """
        return self.forward(transformer, x, time, cast(conditioning, self.dtype)).float()

    @abstractmethod
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the network of this family.

        Args:
            transformer: a transformer of this family.
            x: float32 states ``[batch, *latent_shape]``.
            time: float32 ``[batch]``, as for :meth:`network`.
            conditioning: conditioning of the same batch size; floating entries have the type :attr:`dtype`.

        Returns:
            Like ``x``, in any floating type.
        """

    def velocity(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The output that sampling and likelihood use: :meth:`network` with classifier-free guidance, if configured.

        Rollout and learner both call this, so training differentiates through the guidance (DanceGRPO, App. C). Both
        outputs come from one pass of twice the rows: autograd would otherwise hold a parameter's gradient of one pass
        until it has that of the other, and so those of the whole model at a time.
        """
        if self.config.cfg_scale is None:
            return self.network(transformer, x, time, positive(conditioning))
        both = stack_conditionings([positive(conditioning), negative(conditioning)])
        output = self.network(transformer, torch.cat([x, x]), torch.cat([time, time]), both)
        conditional, unconditional = output.chunk(2)
        return self.guide(conditional, unconditional, self.guidance_scale(time))

    def guidance_scale(self, time: Tensor) -> float | Tensor:
        """Scale of classifier-free guidance, one for all or one a sample ``[batch, 1, 1, 1, 1]``.

        Args:
            time: float32 ``[batch]``, as for :meth:`network`.
        """
        assert self.config.cfg_scale is not None
        return self.config.cfg_scale

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance of outputs like the states, as the pipeline computes it."""
        return guided(conditional, unconditional, scale)

    def told_sigmas(self, num_steps: int) -> NDArray[np.float64] | None:
        """Noise levels ``[num_steps]`` before the shift that this pipeline tells its scheduler, or None."""
        return None

    def shifting_tokens(self) -> int | None:
        """Tokens of a sample, where this pipeline can compute its shift of them."""
        return None

    def told_shift(self, num_steps: int) -> float | None:
        """The logarithm of the shift, where this pipeline has a formula of its own for it."""
        return None

    def noise_grid(self, num_steps: int, settings: NoiseGridConfig) -> NoiseGrid:
        """The noise levels of a walk of ``num_steps`` steps: the one place that all step tables have them from.

        Raises:
            ConfigError: the pipeline has no such grid.
        """
        if settings.grid == "linear":
            assert settings.shift is not None  # checked with the settings
            return NoiseGrid(shifted_sigmas(num_steps, settings.shift))
        return pipeline_grid(
            self.pipeline, num_steps, settings, told=self.told_sigmas(num_steps), tokens=self.shifting_tokens(),
            mu=self.told_shift(num_steps),
        )  # fmt: skip

    def step_table(self, sampler: SamplerConfig, iteration: int = 0) -> StepTable:
        """The step table of a stochastic sampler for this model.

        Args:
            sampler: settings of the sampler.
            iteration: iteration (from 0); moving windows and guidance that ends depend on it.

        Raises:
            ConfigError: the law does not fit what this model predicts, or a step is undefined with these settings.
        """
        if sampler.law == "ddim":
            raise ConfigError(f"sampler.law: ddim is for models that predict the noise; {self.pipeline_class} does not")
        grid = self.noise_grid(sampler.num_steps, sampler)
        try:
            return sampler.table(grid.sigmas, iteration, grid.times)
        except StepTableError as error:
            raise ConfigError(f"sampler: {error}") from error

    def ode_table(self, num_steps: int, settings: NoiseGridConfig, guidance: GuidanceConfig | None = None) -> StepTable:
        """The step table of deterministic sampling, on the noise levels that ``settings`` name."""
        sigmas, times = self.noise_grid(num_steps, settings)
        return StepTable.build("ode", sigmas, guidance=guidance.build() if guidance is not None else None, times=times)

    def prompt_encoder(
        self,
        device: torch.device,
        images: Mapping[str, Path] | None = None,
        encode: PromptEncoder | None = None,
    ) -> PromptEncoder:
        """Loads the prompt encoder, with negative prompt and pictures where this generator needs them.

        Args:
            device: device to encode on.
            images: picture files by prompt, if it takes pictures (:func:`images_for`).
            encode: encodes texts in place of the text encoders, which are then not loaded.

        Returns:
            A function from prompts to their conditioning, which raises ConfigError if a prompt lacks its picture.
        """
        encode = self.load_prompt_encoder(device) if encode is None else encode
        if self.config.cfg_scale is not None:
            encode = with_negative_prompt(encode, self.config.negative_prompt)
        if not self.takes_image:
            return encode
        return with_pictures(encode, self.load_image_encoder(device), lambda prompt: self.picture_of(prompt, images))

    def picture_of(self, prompt: str, images: Mapping[str, Path] | None) -> Path:
        """The picture file of a prompt; raises ConfigError if it has none."""
        if images is None or prompt not in images:
            raise ConfigError(
                f"prompts: {prompt!r} has no image, and a {self.pipeline_class} starts from one; give prompts in "
                '.jsonl files, one {"prompt": ..., "image": ...} a line'
            )
        return images[prompt]

    def never_encoded_alone(self, field: str) -> ConfigError:
        """The error for prompts that were to be encoded before a run, of a generator that reads them with pictures."""
        return ConfigError(
            f"{field}: a {self.pipeline_class} reads every prompt together with its picture, so that none is encoded "
            "before a run; leave prompts.embeddings out of its recipe"
        )

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """Loads what reads pictures, as a function from files to entries of the conditioning.

        Raises:
            ConfigError: this generator takes no image.
        """
        raise ConfigError(
            f"model.path: {self.folder} is a {self.pipeline_class}, which takes no image; for image-to-video give a "
            "pipeline that does, such as a WanImageToVideoPipeline"
        )

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of the entries that :meth:`load_image_encoder` makes."""
        channels, _, height, width = self.latent_shape
        return {IMAGE: (channels, 1, height, width)} if self.takes_image else {}

    def finish(self, samples: Tensor, conditioning: Conditioning) -> Tensor:
        """What the pipeline makes of the samples ``[batch, *latent_shape]`` at the end of a walk; most leave them.

        Args:
            samples: the final states.
            conditioning: conditioning of one prompt, or of one a sample.
        """
        return samples

    def load_working_vae(self, device: torch.device) -> VideoVae:
        """Loads the VAE in ``model.dtype``, with the recipe's memory savers.

        Raises:
            ConfigError: this VAE does not support one of them.
        """
        vae = self.load_vae(device, self.dtype)
        return vae.saving_memory(tiling=self.config.vae_tiling, slicing=self.config.vae_slicing)

    def load_decoder(self, device: torch.device) -> Decoder:
        """Loads the VAE as a function from latents to videos ``[batch, frames, 3, height, width]`` in [0, 1]."""
        return self.load_working_vae(device).decode

    def load_sound_decoder(self, device: torch.device) -> SoundDecoder | None:
        """Loads what makes the sound of a finished sample; None if samples have none."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """Hashes of VAE and encoders: a process reward model fits only generators with the same ones."""
        of_images = (name for name in self.image_components if name.endswith("encoder"))
        parts = ("vae", "audio_vae", "text_encoder", "text_encoder_2", "text_encoder_3", *of_images)
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
        self._check_sides(step)

    def _check_sides(self, step: int) -> None:
        for field, size in (("height", self.config.height), ("width", self.config.width)):
            if size % step:
                raise ConfigError(f"model.{field}: {self.folder} needs a multiple of {step}, which {size} is not")


def images_for(generator: Generator, prompts: PromptsConfig) -> dict[str, Path]:
    """Picture files of a run's prompts, by prompt; empty if its generator takes no image.

    Raises:
        ConfigError: a prompt file cannot be used (:func:`euphonium.prompt_files.prompt_images`).
    """
    return prompt_images([prompts.train, prompts.evaluation]) if generator.takes_image else {}

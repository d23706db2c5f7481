"""Stable Diffusion 1: text-to-image with a U-Net that predicts the noise, guided by classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import GuidanceConfig, ModelConfig, NoiseGridConfig, SamplerConfig
from euphonium.dynamics import Guidance, StepTable
from euphonium.errors import ConfigError
from euphonium.generators.backbone import NetworkClass
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.folder import ComponentConfig, PipelineFolder
from euphonium.generators.images import ImageGenerator
from euphonium.generators.noise_grid import scheduler_config

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


class StableDiffusion(ImageGenerator):
    """Adapter of ``StableDiffusionPipeline``."""

    pipeline_class = "StableDiffusionPipeline"
    backbone = "unet"

    def __init__(self, pipeline: PipelineFolder, config: ModelConfig) -> None:
        """Reads the pipeline's configurations.

        Raises:
            ConfigError: unsupported settings, or a model that does not predict the noise.
        """
        super().__init__(pipeline, config)
        kind = self._schedule().get("prediction_type", "epsilon")
        if kind != "epsilon":
            raise ConfigError(
                f"model.path: {self.folder} predicts {kind!r} (scheduler/scheduler_config.json); this adapter is for "
                "models that predict the noise ('epsilon'), such as Stable Diffusion 1.4 and 1.5"
            )

    def _schedule(self) -> ComponentConfig:
        return scheduler_config(self.pipeline)

    @cached_property
    def _scheduler(self) -> DDIMScheduler:
        """DDIM on the noise schedule that the model was trained with, whichever scheduler the folder names."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self._schedule())

    @override
    def transformer_class(self) -> NetworkClass:
        """A U-Net."""
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    @override
    def trunk_config(self, blocks: int) -> ComponentConfig:
        """Raises ConfigError: no trunk can be cut from a U-Net."""
        raise ConfigError(_no_trunk(self.folder))

    @override
    def token_width(self) -> int:
        """Raises ConfigError: a U-Net has no tokens."""
        raise ConfigError(_no_trunk(self.folder))

    @override
    def step_table(self, sampler: SamplerConfig, iteration: int = 0) -> StepTable:
        if sampler.law != "ddim":
            raise ConfigError(
                f"sampler.law: {sampler.law} is for models that predict the velocity; {self.pipeline_class} predicts "
                "the noise and needs ddim"
            )
        guidance = sampler.guidance.at(iteration) if sampler.guidance is not None else None
        window = sampler.window(iteration)
        return self._table(sampler.num_steps, sampler, sampler.eta, guidance, window)

    @override
    def ode_table(self, num_steps: int, settings: NoiseGridConfig, guidance: GuidanceConfig | None = None) -> StepTable:
        """DDIM without noise."""
        return self._table(num_steps, settings, None, guidance.build() if guidance is not None else None, None)

    def _table(
        self,
        num_steps: int,
        settings: NoiseGridConfig,
        eta: float | None,
        guidance: Guidance | None,
        sde_window: tuple[int, int] | None,
    ) -> StepTable:
        if settings.shift not in (None, 1):
            raise ConfigError(
                f"{settings.section}.shift: a time shift is for flow matching; {self.pipeline_class} has a noise "
                f"schedule of its own, so leave it out instead of setting {settings.shift:g}"
            )
        scheduler, span = self._scheduler, self._timesteps
        if num_steps >= span:
            raise ConfigError(f"num_steps: {self.folder} has {span} noise levels, too few for {num_steps} steps")
        scheduler.set_timesteps(num_steps)
        alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])
        times = scheduler.timesteps.double() / span
        return StepTable.build_ddim(alphas, times, eta=eta, guidance=guidance, sde_window=sde_window)

    @property
    def _timesteps(self) -> int:
        return int(self._scheduler.config.num_train_timesteps)

    @override
    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """Prompts are cut to CLIP's length, 77 tokens."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            self.folder, unet=None, vae=None, safety_checker=None, feature_extractor=None, image_encoder=None,
            requires_safety_checker=False, dtype=self.dtype,
        ).to(device)  # fmt: skip

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            hidden, _ = pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": hidden.to(self.dtype)}

        return encode

    @override
    def token_limit(self, tokenizer: Any) -> int:
        return int(tokenizer.model_max_length)

    @override
    def forward(self, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the noise."""
        output: Tensor = transformer(
            x.squeeze(2).to(self.dtype), (time * self._timesteps).round(), return_dict=False, **conditioning
        )[0]
        return output.unsqueeze(2)


def _no_trunk(folder: Path) -> str:
    return (
        f"a process reward model starts from the first blocks of a transformer, and {folder} has a U-Net; train it "
        "with outcome rewards (leave rewards.process out), and guide it, if at all, with sampler.guidance.source: spsa"
    )

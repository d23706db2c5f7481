"""The supported generators by the class of their diffusers pipeline, and how to open one."""

from __future__ import annotations

import math

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.flux import Flux
from euphonium.generators.flux2 import Flux2Dev, Flux2Klein
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.generator import Generator
from euphonium.generators.hunyuan_video import HunyuanVideo
from euphonium.generators.hunyuan_video_15 import HunyuanVideo15, HunyuanVideo15ImageToVideo
from euphonium.generators.ltx import Ltx
from euphonium.generators.ltx2 import Ltx2
from euphonium.generators.minimax_h3 import MiniMaxH3
from euphonium.generators.qwen_image import QwenImage
from euphonium.generators.qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from euphonium.generators.skyreels import SkyReelsImageToVideo
from euphonium.generators.stable_diffusion import StableDiffusion
from euphonium.generators.stable_diffusion_3 import StableDiffusion3
from euphonium.generators.wan import Wan
from euphonium.generators.wan_image_to_video import WanImageToVideo
from euphonium.generators.z_image import ZImage

# Bytes of one sample, as pixels and as latents: more than this is a mistake, and no process has so much memory.
MOST_SAMPLE_BYTES = 1 << 40

FAMILIES: dict[str, type[Generator]] = {
    family.pipeline_class: family
    for family in (
        HunyuanVideo, HunyuanVideo15, HunyuanVideo15ImageToVideo, SkyReelsImageToVideo, Wan, WanImageToVideo, Flux,
        QwenImage, QwenImageEdit, QwenImageEditPlus, StableDiffusion3, StableDiffusion, ZImage, Flux2Dev, Flux2Klein,
        Ltx, Ltx2, MiniMaxH3,
    )
}  # fmt: skip


def open_generator(config: ModelConfig) -> Generator:
    """Opens the pipeline at ``model.path`` with the adapter of its class; a hub id is downloaded first.

    Raises:
        ConfigError: there is no pipeline, its class is not supported, or it does not support the settings.
    """
    return adapter_of(PipelineFolder.find(config), config)


def adapter_of(pipeline: PipelineFolder, config: ModelConfig) -> Generator:
    """The adapter of a pipeline's class; raises ConfigError as :func:`open_generator` does."""
    name = pipeline.index().get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"model.path: by its {pipeline.index_file} {pipeline.path} is a {name}, for which there is no adapter; "
            f"supported: {', '.join(FAMILIES)}"
        )
    name = _chosen(name, config, pipeline)
    try:
        family = FAMILIES[name](pipeline, config)
        # What the families compute of the components' configurations.
        shape = family.latent_shape
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.path: the config.json files of {FAMILIES[name].backbone} and vae in {pipeline.path} make no {name} "
            f"({type(error).__name__}: {error}); download or copy {pipeline.path} again"
        ) from error
    _refuse_impossible_size(config, shape)
    return family


def _chosen(name: str, config: ModelConfig, pipeline: PipelineFolder) -> str:
    """The class that ``model.pipeline`` says, or else the one of the folder."""
    if config.pipeline in (None, name):
        return name
    able = [kind for kind, family in FAMILIES.items() if name in family.also_opens]
    if config.pipeline not in able:
        raise ConfigError(
            f"model.pipeline: {pipeline.path} is a {name}, which is not opened as a {config.pipeline}; leave it out"
            + (f", or set it to {' or '.join(able)}" if able else "")
        )
    return config.pipeline


def _refuse_impossible_size(config: ModelConfig, latent_shape: tuple[int, ...]) -> None:
    size = 4 * (3 * config.frames * config.height * config.width + math.prod(latent_shape))
    if size > MOST_SAMPLE_BYTES:
        raise ConfigError(
            f"model.frames, model.height and model.width: one sample of {config.frames} frames of {config.height} x "
            f"{config.width} takes {size / (1 << 30):.0f} GiB, and no process can hold more than "
            f"{MOST_SAMPLE_BYTES >> 30}; lower them"
        )

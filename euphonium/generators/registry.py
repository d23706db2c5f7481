"""The supported generators by the class of their diffusers pipeline, and how to open one."""

from __future__ import annotations

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.flux import Flux
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.generator import Generator
from euphonium.generators.hunyuan_video import HunyuanVideo
from euphonium.generators.hunyuan_video_15 import HunyuanVideo15
from euphonium.generators.skyreels import SkyReelsImageToVideo
from euphonium.generators.stable_diffusion import StableDiffusion
from euphonium.generators.stable_diffusion_3 import StableDiffusion3
from euphonium.generators.wan import Wan

FAMILIES: dict[str, type[Generator]] = {
    family.pipeline_class: family
    for family in (HunyuanVideo, HunyuanVideo15, SkyReelsImageToVideo, Wan, Flux, StableDiffusion3, StableDiffusion)
}


def open_generator(config: ModelConfig) -> Generator:
    """Opens the pipeline at ``model.path`` with the adapter of its class; a hub id is downloaded first.

    Raises:
        ConfigError: there is no pipeline, its class is not supported, or it does not support the settings.
    """
    return adapter_of(PipelineFolder.find(config), config)


def adapter_of(pipeline: PipelineFolder, config: ModelConfig) -> Generator:
    """The adapter of a pipeline's class; raises ConfigError as :func:`open_generator` does."""
    name = pipeline.index()["_class_name"]
    if name not in FAMILIES:
        raise ConfigError(
            f"model.path: {pipeline.path} is a {name}, for which there is no adapter; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name](pipeline, config)

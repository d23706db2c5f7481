"""Families by the diffusers pipeline class that they adapt."""

from __future__ import annotations

from euphonium.generators.flux import Flux
from euphonium.generators.generator import GeneratorFamily
from euphonium.generators.hunyuan_video import HunyuanVideo
from euphonium.generators.hunyuan_video_15 import HunyuanVideo15
from euphonium.generators.skyreels import SkyReelsImageToVideo
from euphonium.generators.stable_diffusion import StableDiffusion
from euphonium.generators.stable_diffusion_3 import StableDiffusion3
from euphonium.generators.wan import Wan

FAMILIES: dict[str, type[GeneratorFamily]] = {
    family.pipeline_class: family
    for family in (HunyuanVideo, HunyuanVideo15, SkyReelsImageToVideo, Wan, Flux, StableDiffusion3, StableDiffusion)
}

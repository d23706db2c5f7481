"""Families by the diffusers pipeline class that they adapt."""

from __future__ import annotations

from models.generators.base import GeneratorFamily
from models.generators.flux import Flux
from models.generators.hunyuan_video import HunyuanVideo
from models.generators.hunyuan_video_15 import HunyuanVideo15
from models.generators.skyreels import SkyReelsImageToVideo
from models.generators.stable_diffusion import StableDiffusion
from models.generators.stable_diffusion_3 import StableDiffusion3
from models.generators.wan import Wan

FAMILIES: dict[str, type[GeneratorFamily]] = {
    family.pipeline_class: family
    for family in (HunyuanVideo, HunyuanVideo15, SkyReelsImageToVideo, Wan, Flux, StableDiffusion3, StableDiffusion)
}

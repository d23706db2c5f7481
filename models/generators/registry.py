"""Families by the diffusers pipeline class that they adapt."""

from __future__ import annotations

from models.generators.base import GeneratorFamily
from models.generators.hunyuan_video import HunyuanVideo

FAMILIES: dict[str, type[GeneratorFamily]] = {family.pipeline_class: family for family in (HunyuanVideo,)}

"""The families' tiny pipelines, and what the tests ask of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from actors.rollout import encode_one
from euphonium.config import ModelConfig
from euphonium.generators.conditioning import stack_conditionings
from euphonium.generators.generator import Generator
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.tiny_pipelines import Folders

CPU = torch.device("cpu")
STEPS = 3
PROMPTS = ["a red car", 'a sign "no"']
NEGATIVE_PROMPT = "blurry"
LIMIT = 24


@dataclass(frozen=True)
class Case:
    """A pipeline, what it is asked for, and the names of its own arguments for guidance.

    Attributes:
        pipeline_class: class as which the generator is opened.
        size: frames, height and width.
        embedded_guidance: as in a recipe.
        cfg_scale: as in a recipe.
        variant: which of several models of that class.
        more: further settings of the recipe's ``model``.
    """

    pipeline_class: str
    size: tuple[int, int, int] = (1, 16, 24)
    embedded_guidance: float | None = None
    cfg_scale: float | None = None
    variant: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def tiny(self) -> str:
        """Name of the tiny pipeline."""
        return f"{self.pipeline_class} {self.variant}".strip()

    @property
    def limit(self) -> int:
        """Tokens of a prompt."""
        return int(self.more.get("max_prompt_tokens", LIMIT))

    def config(self, folder: Path, **changes: Any) -> ModelConfig:
        frames, height, width = self.size
        fields: dict[str, Any] = {
            "path": str(folder), "frames": frames, "height": height, "width": width, "max_prompt_tokens": LIMIT,
            "embedded_guidance": self.embedded_guidance, "cfg_scale": self.cfg_scale,
            "negative_prompt": NEGATIVE_PROMPT if self.cfg_scale else "",
        }  # fmt: skip
        return ModelConfig(**(fields | self.more | changes))


CASES: dict[str, Case] = {
    "flux": Case("FluxPipeline", embedded_guidance=3.5),
    "flux with true CFG": Case("FluxPipeline", embedded_guidance=3.5, cfg_scale=2.0),
    "qwen": Case("QwenImagePipeline", cfg_scale=4.0),
    "qwen without CFG": Case("QwenImagePipeline"),
    # Their pictures are square, as the pipeline keeps them.
    "qwen edit": Case("QwenImageEditPipeline", size=(1, 16, 16), cfg_scale=4.0),
    "qwen edit without CFG": Case("QwenImageEditPipeline", size=(1, 16, 16)),
    "qwen edit plus": Case("QwenImageEditPlusPipeline", size=(1, 16, 16), cfg_scale=4.0),
    "z-image": Case("ZImagePipeline", cfg_scale=3.0),
    "z-image without CFG": Case("ZImagePipeline"),
    "flux2 dev": Case("Flux2Pipeline", embedded_guidance=4.0),
    "flux2 klein": Case("Flux2KleinPipeline", cfg_scale=4.0),
    "flux2 klein without CFG": Case("Flux2KleinPipeline"),
    "sd3": Case("StableDiffusion3Pipeline", cfg_scale=4.5),
    "sd3 without CFG": Case("StableDiffusion3Pipeline"),
    "ltx": Case("LTXPipeline", size=(5, 32, 64), cfg_scale=3.0),
    "ltx without CFG": Case("LTXPipeline", size=(5, 32, 64)),
    "ltx 0.9.1": Case("LTXPipeline", size=(5, 32, 64), cfg_scale=3.0, variant="0.9.1"),
    "minimax h3": Case("MiniMaxH3ModularPipeline", size=(22, 16, 24)),
    "ltx2": Case("LTX2Pipeline", size=(5, 32, 64), cfg_scale=4.0),
    "ltx2 without CFG": Case("LTX2Pipeline", size=(5, 32, 64)),
    "ltx2.3": Case("LTX2Pipeline", size=(5, 32, 64), cfg_scale=3.0, variant="2.3"),
    "wan": Case("WanPipeline", size=(5, 16, 32), cfg_scale=5.0),
    "wan 2.2": Case("WanPipeline", size=(5, 16, 32), cfg_scale=5.0, variant="2.2"),
    "wan a14b": Case(
        "WanPipeline", size=(5, 16, 32), cfg_scale=4.0, variant="A14B", more={"cfg_scale_2": 3.0}
    ),
    "wan a14b i2v": Case("WanImageToVideoPipeline", size=(5, 16, 32), cfg_scale=3.5, variant="A14B"),
    "wan i2v": Case(
        "WanImageToVideoPipeline", size=(5, 16, 32), cfg_scale=5.0, more={"max_prompt_tokens": 512}
    ),
    "wan 2.2 i2v": Case(
        "WanImageToVideoPipeline", size=(5, 16, 32), cfg_scale=5.0, variant="2.2",
        more={"pipeline": "WanImageToVideoPipeline"},
    ),
    "sd1": Case("StableDiffusionPipeline", cfg_scale=7.5),
    "hunyuan": Case("HunyuanVideoPipeline", size=(5, 32, 48), embedded_guidance=6.0),
    "hunyuan with true CFG": Case("HunyuanVideoPipeline", size=(5, 32, 48), embedded_guidance=6.0, cfg_scale=2.0),
    "hunyuan 1.5": Case("HunyuanVideo15Pipeline", size=(5, 16, 24), cfg_scale=6.0),
    "hunyuan 1.5 i2v": Case("HunyuanVideo15ImageToVideoPipeline", size=(5, 32, 32), cfg_scale=6.0),
    "skyreels": Case("HunyuanSkyreelsImageToVideoPipeline", size=(5, 32, 48), embedded_guidance=1.0, cfg_scale=6.0),
}  # fmt: skip
TRANSFORMERS = [
    "flux",
    "flux2 dev",
    "flux2 klein",
    "z-image",
    "qwen",
    "qwen edit",
    "qwen edit plus",
    "sd3",
    "ltx",
    "ltx 0.9.1",
    "minimax h3",
    "ltx2",
    "ltx2.3",
    "wan",
    "wan 2.2",
    "wan i2v",
    "wan 2.2 i2v",
    "wan a14b",
    "wan a14b i2v",
    "hunyuan",
    "hunyuan 1.5",
    "hunyuan 1.5 i2v",
    "skyreels",
]
one_a_family = pytest.mark.parametrize("name", [*TRANSFORMERS, "sd1"])
one_a_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


def family_of(name: str, folders: Folders, **changes: Any) -> Generator:
    case = CASES[name]
    return open_generator(case.config(folders(case.tiny), **changes))


def noise(family: Generator, batch: int = len(PROMPTS)) -> Tensor:
    return torch.randn(batch, *family.latent_shape, generator=torch.Generator().manual_seed(0))


def pictures(family: Generator) -> dict[str, Path]:
    """First frames of the prompts, of another size than the videos, beside the pipeline's folder."""
    files = {prompt: family.folder.parent / f"{i}.png" for i, prompt in enumerate(PROMPTS)}
    for i, file in enumerate(files.values()):
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[: 10 + 20 * i, :, i] = 255
        Image.fromarray(pixels).save(file)
    return files


def conditioning_of(family: Generator, prompts: Sequence[str] = PROMPTS) -> dict[str, Tensor]:
    encode = family.prompt_encoder(CPU, pictures(family) if family.takes_image else None)
    return stack_conditionings([encode_one(encode, prompt) for prompt in prompts])

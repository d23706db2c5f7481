"""The networks of guided_step.py: sizes, random weights, the conditioning they take; nothing here is measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from euphonium.config import ModelConfig
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the networks and of the state.

    Attributes:
        transformer: configuration of the transformer; what is left out has the class's default,
            which is the published model's.
        model: shape of a sample, and type of the weights.
        head: options of the process reward model's head.
        prm_blocks: blocks of its trunk.
        kind: name of the model: of its pipeline's and its transformer's class.
        spatial: pixels a side for one latent.
    """

    transformer: dict[str, Any]
    model: dict[str, Any]
    head: dict[str, Any] = field(default_factory=dict)
    prm_blocks: int = 1
    kind: str = "HunyuanVideo"
    spatial: int = 8


FULL = Setup(
    transformer={},
    model={
        "dtype": "bfloat16", "frames": 33, "height": 480, "width": 480, "max_prompt_tokens": 256,
        "embedded_guidance": 6.0,
    },
    head={},
    prm_blocks=8,
)  # fmt: skip
TINY = Setup(
    transformer={
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 4,
        "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16, "rope_axes_dim": [4, 6, 6],
    },
    model={
        "dtype": "bfloat16", "frames": 9, "height": 64, "width": 64, "max_prompt_tokens": 8, "embedded_guidance": 6.0,
    },
    head={"hidden": 16},
    prm_blocks=2,
)  # fmt: skip


@contextmanager
def family_of(setup: Setup) -> Iterator[Generator]:
    """The generator family of a setup: configuration files without weights, in a folder that goes away."""
    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, f"{setup.kind}Transformer3DModel")(**setup.transformer)
    files = {
        "model_index.json": json.dumps({"_class_name": f"{setup.kind}Pipeline"}),
        # Not dict(transformer.config): that lists the values that were left out, and from_config would ignore ours.
        "transformer/config.json": transformer.to_json_string(),
        "vae/config.json": json.dumps(
            {
                "latent_channels": transformer.config.out_channels,
                "spatial_compression_ratio": setup.spatial,
                "temporal_compression_ratio": 4,
            }
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        yield open_generator(ModelConfig(path=folder, **setup.model))


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Networks built inside get their weights on this device in this type at once: 12.8 B need no detour."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_generator(family: Generator, device: torch.device) -> nn.Module:
    """A transformer with random weights."""
    with made_on(device, family.dtype):
        return family.build_transformer().eval().requires_grad_(False)


def build_prm(family: Generator, setup: Setup, device: torch.device) -> ProcessRewardModel:
    """A process reward model with random weights; its head is in float32 whatever the trunk is in."""
    with made_on(device, family.dtype):
        model = ProcessRewardModel(family, setup.prm_blocks, setup.head)
    model.head.float()
    return model.eval().requires_grad_(False)


def random_conditioning(family: Generator, batch: int, device: torch.device) -> Conditioning:
    """Text embeddings of full length."""
    config = family.transformer_config()
    tokens = family.config.max_prompt_tokens

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=family.dtype)

    return {
        "encoder_hidden_states": draw(tokens, int(config["text_embed_dim"])),
        "encoder_attention_mask": torch.ones(batch, tokens, device=device, dtype=family.dtype),
        "pooled_projections": draw(int(config["pooled_projection_dim"])),
    }

"""Models of the published classes, small enough to compute here and large enough to see their memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers

from euphonium.config import RunConfig
from euphonium.generators.described import PUBLISHED

Changes = dict[str, dict[str, Any]]

# Fields of the components' configurations that differ from the published model's, and the recipe's section `model`.
MEDIUM: dict[str, tuple[str, Changes, dict[str, Any]]] = {
    "hunyuan-video": (
        "hunyuanvideo-community/HunyuanVideo",
        {
            "transformer": {
                "num_layers": 3, "num_single_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64,
                "rope_axes_dim": [8, 28, 28], "text_embed_dim": 256,
            },
            "vae": {"block_out_channels": [32, 64, 64, 64]},
        },
        {"frames": 5, "height": 160, "width": 160, "embedded_guidance": 6.0, "max_prompt_tokens": 64},
    ),
    "wan": (
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        {
            "transformer": {
                "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "text_dim": 256,
            },
            "vae": {"base_dim": 32},
        },
        {"frames": 5, "height": 160, "width": 160, "cfg_scale": 5.0, "max_prompt_tokens": 64},
    ),
    "flux": (
        "black-forest-labs/FLUX.1-dev",
        {
            "transformer": {
                "num_layers": 3, "num_single_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64,
                "axes_dims_rope": [8, 28, 28], "joint_attention_dim": 256,
            },
            "vae": {"block_out_channels": [32, 64, 64, 64]},
        },
        {"height": 320, "width": 320, "embedded_guidance": 3.5, "max_prompt_tokens": 64},
    ),
    "stable-diffusion-3.5": (
        "stabilityai/stable-diffusion-3.5-medium",
        {
            "transformer": {
                "num_layers": 6, "num_attention_heads": 4, "caption_projection_dim": 256, "joint_attention_dim": 256,
                "pooled_projection_dim": 256, "pos_embed_max_size": 64, "dual_attention_layers": [0, 1, 2],
            },
            "vae": {"block_out_channels": [32, 64, 64, 64]},
        },
        {"height": 320, "width": 320, "cfg_scale": 4.5, "max_prompt_tokens": 64},
    ),
}  # fmt: skip


def medium(name: str, folder: Path, **settings: Any) -> RunConfig:
    """A recipe of a medium model, whose configuration files are written to a folder; only its VAE has weights."""
    source, changes, model = MEDIUM[name]
    shutil.copytree(PUBLISHED / source, folder, dirs_exist_ok=True)
    for component, fields in changes.items():
        file = folder / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    kind = getattr(diffusers, json.loads((folder / "vae" / "config.json").read_text())["_class_name"])
    kind.from_config(kind.load_config(folder / "vae")).save_pretrained(folder / "vae")
    return recipe({"path": str(folder), **model}, **settings)


def recipe(model: dict[str, Any], **settings: Any) -> RunConfig:
    """A recipe of a model with a learner that saves memory; further sections replace those of this one."""
    sections: dict[str, Any] = {
        "name": "planned",
        "iterations": 10,
        "model": model,
        "prompts": {"train": "train.txt", "evaluation": "held_out.txt"},
        "sampler": {"law": "dance", "eta": 0.3, "num_steps": 8, "sde_window": [0, 7]},
        "rollout": {"prompts_per_iteration": 8, "group_size": 4},
        "rewards": {"outcome": [{"name": "icon", "type": "sprite_icon"}]},
        "optimizer": {"learning_rate": 1e-5},
        "pools": {"learner": {"rows_per_micro_batch": 2, "gradient_checkpointing": True}},
    }
    return RunConfig.model_validate(sections | settings)

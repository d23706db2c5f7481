"""Shared fixtures: a generator of the real classes with fresh weights, small enough to build in a second."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from euphonium.config import RunConfig, load_config

torch.set_num_threads(1)
# How long an example takes says more about the machine than about the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HunyuanVideo pipeline in the embedded generator's configuration, untrained."""
    from euphonium.embedded.train import build_pipeline
    from euphonium.embedded.train_vae import build_vae

    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    pipeline = build_pipeline(build_vae())
    # diffusers starts gates and output at small values; without more the network is close to a constant.
    for parameter in pipeline.transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter.data.flatten(1), gain=1.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prm(tiny_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained process reward model of that generator."""
    from euphonium.config import ModelConfig
    from euphonium.generators.registry import open_generator
    from euphonium.rewards.process import ProcessRewardModel

    folder = tmp_path_factory.mktemp("prm")
    torch.manual_seed(1)
    config = ModelConfig(path=str(tiny_generator), frames=9, height=32, width=32, max_prompt_tokens=16)
    ProcessRewardModel.from_generator(open_generator(config), blocks=2).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe_file(tiny_generator: Path, tiny_prm: Path) -> Callable[..., RunConfig]:
    """Writes the recipe of a tiny run and its prompts into a folder; further arguments are ``a.b=c`` overrides."""
    seen = ["a red car moving left on a white background", "a blue fish moving up on a gray background"]
    held_out = ["a red heart moving down on a black background", "a green frog moving right on a blue background"]

    def write(folder: Path, *overrides: str) -> RunConfig:
        (folder / "train.txt").write_text("\n".join(seen))
        (folder / "held_out.txt").write_text("\n".join(held_out))
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tiny_recipe(tiny_generator, tiny_prm, folder)))
        return load_config(recipe, overrides)

    return write


@pytest.fixture
def make_config(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Builds configurations of a tiny run in the test's own folder; arguments are ``a.b=c`` overrides."""
    return lambda *overrides: tiny_recipe_file(tmp_path, *overrides)


def tiny_recipe(generator: Path, prm: Path, folder: Path) -> dict[str, Any]:
    """A recipe of a few seconds, with every role in it."""
    actor = {"num_cpus": 0.1}
    return {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "iterations": 2,
        "model": {"path": str(generator), "frames": 9, "height": 32, "width": 32, "max_prompt_tokens": 16},
        "prompts": {"train": str(folder / "train.txt"), "evaluation": str(folder / "held_out.txt")},
        "sampler": {
            "law": "dance", "eta": 0.5, "num_steps": 4, "shift": 3.0, "guidance": {"scale": 0.2, "window": [1, 3]},
        },
        "rollout": {"prompts_per_iteration": 2, "group_size": 3},
        "rewards": {
            "outcome": [
                {"name": "icon", "type": "sprite_icon"},
                {"name": "motion", "type": "sprite_motion"},
                {"name": "quality", "type": "sprite_quality", "weight": 0.5},
            ],
            "process": {"path": str(prm)},
        },
        "optimizer": {"learning_rate": 1e-4},
        "evaluation": {"every": 2, "num_steps": 4, "prompts": 2, "clips": 2},
        "pools": {
            "rollout": {"num_actors": 2, **actor}, "prm": actor, "orm": actor,
            "learner": {"num_workers": 2, **actor},
        },
        "checkpoint": {"every": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster that nobody else sees, or the one that RAY_ADDRESS names, which saves the start."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(namespace="tests", log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=4, namespace="tests", include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved tiny pipeline, by its name in tests/euphonium/generators/tiny_pipelines.py."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        from tests.euphonium.generators.tiny_pipelines import save_pipeline

        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_pipeline(name, made[name])
        return made[name]

    return folder

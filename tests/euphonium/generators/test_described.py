"""Descriptions of published models have the published numbers of parameters, and need no weights and no network."""

import socket
from pathlib import Path

import pytest
import torch

from euphonium.config import ModelConfig, load_config
from euphonium.errors import ConfigError
from euphonium.generators.described import PUBLISHED, describe_generator, published_models
from euphonium.generators.folder import PipelineFolder

# Published sizes, in billions, and how far a rounded one may be off.
SIZES = {
    "hunyuanvideo-community/HunyuanVideo": (12.821, 0.001),
    "Skywork/SkyReels-V1-Hunyuan-I2V": (12.821, 0.001),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": (8.33, 0.03),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": (8.33, 0.03),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14.288, 0.01),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1.419, 0.005),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (16.395, 0.01),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (5.000, 0.005),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (28.577, 0.01),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": (28.578, 0.01),
    "Lightricks/LTX-Video": (1.923, 0.001),
    # Its weights are 66.3 GB in bfloat16, a few of them in float32.
    "MiniMaxAI/MiniMax-H3": (33.123, 0.03),
    "Lightricks/LTX-2": (18.876, 0.001),
    "diffusers/LTX-2.3-Diffusers": (18.989, 0.001),
    "Qwen/Qwen-Image": (20.430, 0.005),
    "Qwen/Qwen-Image-Edit": (20.430, 0.005),
    "Qwen/Qwen-Image-Edit-2509": (20.430, 0.005),
    "Tongyi-MAI/Z-Image-Turbo": (6.155, 0.01),
    "black-forest-labs/FLUX.2-klein-4B": (3.876, 0.01),
    "black-forest-labs/FLUX.2-klein-9B": (9.079, 0.01),
    "black-forest-labs/FLUX.2-dev": (32.223, 0.001),
    "black-forest-labs/FLUX.1-dev": (11.901, 0.001),
    "stabilityai/stable-diffusion-3.5-medium": (2.243, 0.005),
    "CompVis/stable-diffusion-v1-4": (0.8595, 0.0005),
}


def model(path: str) -> ModelConfig:
    index = PipelineFolder(PUBLISHED / path).index()["_class_name"]
    distilled = ("Hunyuan" in index and "15" not in index) or index in ("FluxPipeline", "Flux2Pipeline")
    guidance = 1.0 if distilled else None
    frames = 22 if index == "MiniMaxH3ModularPipeline" else 1
    return ModelConfig(
        path=path, frames=frames, height=512, width=512, max_prompt_tokens=512, embedded_guidance=guidance
    )


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a description asks for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_recipe_has_a_description() -> None:
    paths = [path for path in Path("recipes").rglob("*.yaml") if path.name not in ("base.yaml", "prm.yaml", "orm.yaml")]
    named = {load_config(path).model.path for path in paths}
    # SkyReels' folder is put together from published parts, and described under its name.
    described = {*published_models(), *(f"weights/{Path(name).name}" for name in published_models())}
    assert {name for name in named if not Path(name).exists()} <= described
    assert set(SIZES) == set(published_models())


@pytest.mark.parametrize("path", SIZES)
def test_a_network_has_the_published_number_of_parameters(path: str) -> None:
    generator = describe_generator(model(path))
    with torch.device("meta"):
        network = generator.build_transformer()
    size, tolerance = SIZES[path]
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(size, abs=tolerance)
    assert not generator.transformer_files()


@pytest.mark.parametrize("path", SIZES)
def test_a_vae_is_described_and_fits_the_latents(path: str) -> None:
    generator = describe_generator(model(path))
    vae = generator.load_vae(torch.device("meta"), torch.bfloat16)
    latents = torch.zeros(1, *generator.latent_shape, device="meta")
    assert vae.decode(latents).shape == (1, generator.config.frames, 3, 512, 512)


def test_a_local_folders_own_files_win(tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "hunyuanvideo-community/HunyuanVideo"
    Path(name).parent.mkdir()
    Path(name).symlink_to(tiny_generator)
    config = ModelConfig(path=name, frames=9, height=32, width=32)
    assert describe_generator(config).transformer_config()["num_layers"] < 20


def test_a_model_without_a_description_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.path: some/model is no folder .*FLUX.1-dev"):
        describe_generator(ModelConfig(path="some/model", height=64, width=64))

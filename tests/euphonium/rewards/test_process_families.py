"""A process reward model of every family: trained on preferences, saved, loaded, and bound to its own generator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from actors.rollout import encode_one
from euphonium.config import ModelConfig, PrmConfig
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import stack_conditionings
from euphonium.generators.generator import Generator
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from learners.engine.local import LocalEngine
from learners.rewards.preference import gaps_by_noise
from learners.rewards.prm_data import Drawing, open_prepared
from learners.rewards.process import PrmTraining
from learners.rewards.worker import train
from orchestrator.commands.train_prm import train_prm
from tests.euphonium.generators.tiny_pipelines import BUILDERS, SHAPES, Folders, model_fields

CPU = torch.device("cpu")
UNET = "StableDiffusionPipeline"
TRANSFORMERS = [name for name in BUILDERS if name != UNET]
# Variants of families that are trained in every test run.
VARIANTS = {
    "HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideo15ImageToVideoPipeline", "LTXPipeline 0.9.1",
    "LTX2Pipeline 2.3", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "WanImageToVideoPipeline",
    "WanImageToVideoPipeline A14B", "WanPipeline 2.2", "WanPipeline A14B",
}  # fmt: skip
each_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in TRANSFORMERS]
)
PROMPTS = {"train": ["a red car", "a cat", "two fish"], "held_out": ["a green frog", "a sign"]}
SAMPLES = 16
# More channels that do not matter take more samples to be told from the one that does.
MORE_SAMPLES = {"Flux2Pipeline": 48, "Flux2KleinPipeline": 48}
PAIRS = 24


@dataclass(frozen=True)
class Trained:
    """A training that is done.

    Attributes:
        family: of the generator.
        config: its recipe.
        before: gaps of held-out pairs by tenth of sigma, ahead of the first update.
        records: what it reported.
        engine: around the model.
    """

    family: Generator
    config: PrmConfig
    before: np.ndarray
    records: list[dict[str, Any]]
    engine: LocalEngine


@pytest.fixture(scope="module")
def trained(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def training(name: str) -> Trained:
        if name not in made:
            made[name] = train_one(name, folders(name), tmp_path_factory.mktemp("training"))
        return made[name]

    return training


def recipe(name: str, generator: Path, folder: Path, **more: Any) -> PrmConfig:
    values = {
        "name": "prm", "output_dir": folder / "runs", "target": folder / "prm", "blocks": 2,
        "model": model_fields(name, generator),
        "optimizer": {
            "updates": 60, "pairs_per_update": 8, "pairs_per_micro_batch": 8, "learning_rate": 3e-3, "ema_decay": 0.8,
            "evaluate_every": 30, "evaluation_pairs": 4, "checkpoint_every": 1000,
        },
    }  # fmt: skip
    drawn = {"prompts": {"train": "p.txt", "evaluation": "p.txt"}, "outcome": [{"name": "x", "type": "sprite_icon"}]}
    return PrmConfig.model_validate(values | (more or drawn))


def picture(folder: Path) -> Path:
    file = folder / "first.png"
    Image.new("RGB", (32, 32), "red").save(file)
    return file


def train_one(name: str, generator: Path, folder: Path) -> Trained:
    """Trains on samples whose score is the mean of their first channel; the others' means do not matter."""
    config = recipe(name, generator, folder)
    family = open_generator(config.model)
    samples = MORE_SAMPLES.get(name, SAMPLES)
    random = torch.Generator().manual_seed(0)
    for part, prompts in PROMPTS.items():
        encode = family.prompt_encoder(CPU, dict.fromkeys(prompts, picture(folder)) if family.takes_image else None)
        latents = torch.randn(len(prompts) * samples, *family.latent_shape, generator=random)
        latents += 2 * torch.randn(*latents.shape[:2], 1, 1, 1, generator=random)
        drawing = Drawing.begin(config.run_dir / "data" / part, "mark", tuple(latents.shape))
        drawing.write(0, latents.numpy(), latents[:, 0].mean(dim=(1, 2, 3)).double().numpy())
        conditioning = stack_conditionings([encode_one(encode, prompt) for prompt in prompts])
        drawing.finish(np.repeat(np.arange(len(prompts)), samples), conditioning)
    training = PrmTraining(config, CPU)
    engine = LocalEngine(training.model, training.settings, CPU)
    before = gaps_by_noise(engine, training.held_out, training.held_out.pairs, per_tenth=PAIRS)
    records: list[dict[str, Any]] = []
    train(config, engine, training, records.append)
    return Trained(family, config, before, records, engine)


def held_out_states(run: Trained) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Held-out samples of one prompt under noise of low, middle and high levels."""
    data = open_prepared(run.config.run_dir / "data" / "held_out", 0.0)
    sigma = torch.tensor([0.05, 0.2, 0.5, 0.95])
    clean = data.latents[np.arange(len(sigma))]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    return noisy, sigma, {n: t[:1].expand(len(sigma), *t.shape[1:]) for n, t in data.conditioning.items()}


def test_every_family_with_a_transformer_is_trained() -> None:
    assert set(SHAPES) == set(BUILDERS) == {*TRANSFORMERS, UNET}


@each_family
def test_training_lowers_the_loss_and_ranks_samples_of_new_prompts(
    name: str, trained: Callable[[str], Trained]
) -> None:
    run = trained(name)
    losses = [record["loss"] for record in run.records if "measured" in record]
    assert len(losses) == 2
    assert losses[1] < 0.7 * losses[0]
    data = open_prepared(run.config.run_dir / "data" / "held_out", run.config.pairs.margin)
    with run.engine.averaged():
        after = gaps_by_noise(run.engine, data, data.pairs, per_tenth=PAIRS)
    loss, accuracy = (
        [measure(gaps) for gaps in (run.before, after)]
        for measure in (lambda g: float(np.logaddexp(0, -g).mean()), lambda g: float((g > 0).mean()))
    )
    assert loss[1] < 0.7 * loss[0]
    assert accuracy[1] > 0.85
    assert accuracy[1] > accuracy[0] + 0.1


@each_family
def test_a_saved_model_gives_the_same_rewards_and_a_gradient_that_raises_them(
    name: str, trained: Callable[[str], Trained]
) -> None:
    run = trained(name)
    x, sigma, conditioning = held_out_states(run)
    with run.engine.averaged():
        kept = run.engine.model(x, sigma, conditioning)
    loaded = ProcessRewardModel.load(run.config.target, run.config.model)
    rewards, gradient = loaded.reward_and_gradient(x, sigma, conditioning)
    assert torch.equal(rewards, kept)
    assert gradient.shape == x.shape
    assert bool(torch.isfinite(gradient).all())
    norm = gradient.flatten(1).norm(dim=1)
    assert float(norm.min()) > 0
    # A small step along it raises every reward as far as it says.
    step = 1e-2 / norm
    with torch.no_grad():
        raised = loaded(x + step.view(-1, 1, 1, 1, 1) * gradient, sigma, conditioning) - rewards
    torch.testing.assert_close(raised, step * norm.square(), rtol=0.1, atol=1e-5)
    # It points to what the preferences reward: more of the first channel.
    assert float(gradient[:2, 0].mean()) > float(gradient[:2, 1:].mean().abs())


@each_family
def test_a_model_is_refused_by_every_other_family(
    name: str, trained: Callable[[str], Trained], folders: Folders
) -> None:
    run = trained(name)
    own, others = name.split()[0], [other for other in BUILDERS if other.split()[0] != name.split()[0]]
    for other in others:
        config = ModelConfig(**model_fields(other, folders(other)))
        kind = other.split()[0]
        with pytest.raises(ConfigError, match=rf"was trained for a {own}, and .* is a {kind}.*euphonium train-prm"):
            ProcessRewardModel.load(run.config.target, config)


def test_a_unet_is_refused_before_anything_is_drawn(folders: Folders, tmp_path: Path) -> None:
    prompts = {part: tmp_path / f"{part}.txt" for part in ("train", "evaluation")}
    for part, file in prompts.items():
        file.write_text(f"a red car to {part}\n")
    asked = recipe(UNET, folders(UNET), tmp_path, prompts=prompts, outcome=[{"name": "x", "type": "sprite_icon"}])
    with pytest.raises(ConfigError, match=r"has a U-Net; train it with outcome rewards"):
        train_prm(asked, print)
    assert not (tmp_path / "runs").exists()


def test_image_to_video_trains_from_preference_files_with_pictures(folders: Folders, tmp_path: Path) -> None:
    name = "HunyuanSkyreelsImageToVideoPipeline"
    shape = open_generator(ModelConfig(**model_fields(name, folders(name)))).latent_shape
    image = picture(tmp_path).name
    rows = []
    for i, prompt in enumerate(PROMPTS["train"]):
        for sample, level in (("winner", 2.0), ("loser", -2.0)):
            latent = np.random.default_rng(i).standard_normal(shape).astype(np.float32)
            latent[0] += level
            np.save(tmp_path / f"{sample}{i}.npy", latent)
        rows.append({"prompt": prompt, "winner": f"winner{i}.npy", "loser": f"loser{i}.npy"})
    optimizer = {
        "updates": 20, "pairs_per_update": 4, "pairs_per_micro_batch": 4, "learning_rate": 3e-3, "ema_decay": 0.5,
        "evaluation_pairs": 4,
    }  # fmt: skip
    more = {"preferences": {"train": tmp_path / "p.jsonl", "held_out_fraction": 0.34}, "optimizer": optimizer}
    config = recipe(name, folders(name), tmp_path, **more)
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=r"have no image, .* a HunyuanSkyreelsImageToVideoPipeline starts from"):
        train_prm(config, print)
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row | {"image": image}) for row in rows))
    accuracy = train_prm(config, print)
    assert np.mean(accuracy[:3]) > 0.9
    assert ProcessRewardModel.load(config.target, config.model).blocks == 2

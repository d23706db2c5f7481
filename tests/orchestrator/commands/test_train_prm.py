"""``train-prm`` from recipe to report: samples that are drawn, preferences from files, and a real Ray group."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from euphonium.config import ModelConfig, PrmConfig, RunConfig
from euphonium.embedded.sprites import split_scenes
from euphonium.embedded.sprites.render import render
from euphonium.errors import CheckpointError, ConfigError
from euphonium.generators.encoding import fitted, load_encoder
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from orchestrator.commands.train_prm import accuracy_chart, accuracy_table, train_prm
from reward_servers.orm import OrmScorer

EMBEDDED = {
    "path": "euphonium/embedded/weights",
    "frames": 9,
    "height": 32,
    "width": 32,
    "max_prompt_tokens": 16,
}
OPTIMIZER = {
    "updates": 4, "pairs_per_update": 4, "pairs_per_micro_batch": 1, "evaluate_every": 2, "evaluation_pairs": 4,
    "checkpoint_every": 2, "learning_rate": 1e-3, "eps": 1e-4, "ema_decay": 0.5,
}  # fmt: skip


def drawn(folder: Path, config: RunConfig, **more: Any) -> PrmConfig:
    values = {
        "name": "prm", "output_dir": folder / "runs", "target": folder / "prm", "blocks": 1,
        "model": EMBEDDED, "prompts": config.prompts.model_dump(),
        "outcome": [{"name": n, "type": f"sprite_{n}"} for n in ("icon", "motion", "quality")],
        "pairs": {"samples_per_prompt": 4, "held_out_samples_per_prompt": 3, "num_steps": 4, "margin": 1e-3},
        "optimizer": OPTIMIZER,
    }  # fmt: skip
    return PrmConfig.model_validate(values | more)


@pytest.fixture(scope="module")
def trained(tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("local")
    run = tiny_recipe_file(folder)
    lines: list[str] = []
    accuracy = train_prm(drawn(folder, run), lines.append)
    return {"folder": folder, "run": run, "lines": lines, "accuracy": accuracy}


def test_drawn_samples_make_a_model_a_table_and_a_picture(trained: dict[str, Any]) -> None:
    folder, lines = trained["folder"], trained["lines"]
    report = json.loads((folder / "runs" / "prm" / "accuracy.json").read_text())
    assert report["accuracy"] == trained["accuracy"]
    assert report["sigma_edges"][:2] == [0.0, 0.1]
    assert len(report["accuracy_without_margin"]) == len(report["calibration_error"]) == 10
    assert report["pairs"] == 20
    assert report["updates"] == 4
    text = "\n".join(lines)
    assert "update 2/4, loss " in text
    assert "accuracy by tenth" in text
    assert "min left" in text
    assert "sigma 0.9 - 1.0" in text
    with Image.open(folder / "runs" / "prm" / "accuracy.png") as picture:
        assert picture.size == (760, 440)
    model = ProcessRewardModel.load(folder / "prm", ModelConfig(**EMBEDDED))
    assert model.blocks == 1
    description = json.loads((folder / "prm" / "prm.json").read_text())
    assert np.allclose(description["held_out_accuracy"], report["accuracy"], atol=1e-4)


def test_the_same_command_again_draws_nothing_and_trains_nothing(trained: dict[str, Any]) -> None:
    folder, lines = trained["folder"], []
    before = load_file(folder / "prm" / "model.safetensors")
    assert train_prm(drawn(folder, trained["run"]), lines.append) == trained["accuracy"]
    assert any("samples from" in line for line in lines)
    assert "going on from the checkpoint of update 4" in lines
    after = load_file(folder / "prm" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_drawing_goes_on_where_it_was_interrupted(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are on disk batch by batch; what is drawn after an interruption is what would have been drawn."""
    monkeypatch.setattr("orchestrator.commands.train_prm.BATCH", 2)
    whole = train_prm(drawn(tmp_path / "whole", trained["run"]), print)
    config = drawn(tmp_path / "cut", trained["run"])
    score, batches = OrmScorer.score, []

    def interrupted(self: OrmScorer, *arguments: Any) -> Any:
        batches.append(len(arguments[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return score(self, *arguments)

    monkeypatch.setattr(OrmScorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_prm(config, print)
    lines: list[str] = []
    batches.append(0)
    assert train_prm(config, lines.append) == whole
    assert "train: 4 of 8 samples are there already" in lines
    assert batches == [2, 2, 2, 0, 2, 2, 2, 2, 2], "two of four batches of training, then three of held-out samples"
    folders = [tmp_path / name / "runs" / "prm" / "data" / "train" for name in ("whole", "cut")]
    assert np.array_equal(*(np.load(folder / "latents.npy") for folder in folders))
    assert sorted(path.name for path in folders[1].iterdir()) == [
        "conditioning.safetensors", "index.json", "latents.npy", "samples.npz",
    ]  # fmt: skip


def test_another_recipe_in_the_same_folder_is_refused(trained: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="another recipe; give this one another name"):
        train_prm(drawn(trained["folder"], trained["run"], optimizer=OPTIMIZER | {"weight_decay": 0.5}), print)


def test_too_many_blocks_are_refused_before_anything_is_drawn(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="trunk of 99 blocks"):
        train_prm(drawn(tmp_path, make_config(), blocks=99), print)
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_group_of_two_ends_with_the_weights_of_one_process(trained: dict[str, Any], tmp_path: Path) -> None:
    learner = {"num_workers": 2, "num_cpus": 0.5, "max_failures": 0}
    lines: list[str] = []
    accuracy = train_prm(drawn(tmp_path, trained["run"], learner=learner), lines.append)
    ours, theirs = (load_file(f / "prm" / "model.safetensors") for f in (tmp_path, trained["folder"]))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    assert accuracy == trained["accuracy"]
    assert any(line.startswith("update 4/4") for line in lines)


def test_chart_puts_values_where_they_belong() -> None:
    result = {"accuracy": [0.9] * 10, "calibration_error": [0.1] * 10, "margin": 0.1}
    pixels = np.asarray(accuracy_chart(result, "x").convert("RGB")).astype(int)

    def rows_of(colour: tuple[int, int, int]) -> np.ndarray:
        # In the plotted area, away from its frame.
        found = (abs(pixels[41:335, 200:600] - np.array(colour)).sum(axis=-1) == 0).any(axis=1)
        return np.flatnonzero(found) + 41

    height = 336 - 40
    assert abs(rows_of((0x0B, 0x63, 0xC5)).mean() - (336 - 0.9 * height)) < 2
    assert abs(rows_of((0xD1, 0x57, 0x0B)).mean() - (336 - 0.1 * height)) < 2
    assert "90.0%" in accuracy_table(result)


# --- preferences from files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> tuple[list[str], np.ndarray]:
    """Captions and uint8 clips ``[6, 9, 32, 32, 3]``."""
    chosen = split_scenes()[0][:60:10]
    videos = render(chosen, torch.Generator().manual_seed(0)).permute(0, 1, 3, 4, 2)
    return [scene.caption for scene in chosen], (videos.numpy() * 255).round().astype(np.uint8)


def test_videos_and_latents_in_a_file_train_a_model(scenes: tuple[list[str], np.ndarray], tmp_path: Path) -> None:
    captions, videos = scenes
    family = open_generator(ModelConfig(**EMBEDDED))
    rows: list[dict[str, Any]] = []
    for i, (caption, video) in enumerate(zip(captions, videos, strict=True)):
        np.save(tmp_path / f"good{i}.npy", video)
        noise = np.random.default_rng(i).standard_normal(family.latent_shape).astype(np.float32)
        np.save(tmp_path / f"bad{i}.npy", noise)
        images = [Image.fromarray(frame) for frame in video]
        images[0].save(tmp_path / f"other{i}.gif", save_all=True, append_images=images[1:])
        rows.append({"prompt": caption, "winner": f"good{i}.npy", "loser": f"bad{i}.npy"})
        rows.append({"prompt": caption, "sample": f"other{i}.gif", "label": 1})
        rows.append({"prompt": caption, "sample": f"bad{i}.npy", "label": 0})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PrmConfig(
        name="files",
        output_dir=tmp_path / "runs",
        target=tmp_path / "prm",
        blocks=1,
        model=EMBEDDED,
        preferences={"train": tmp_path / "p.jsonl", "held_out_fraction": 0.34},
        optimizer=OPTIMIZER | {"updates": 16, "evaluate_every": 16, "evaluation_pairs": 8, "eps": 1e-8},
    )
    lines: list[str] = []
    accuracy = train_prm(config, lines.append)
    # Sprites against pure noise: a few updates tell them apart where there is little noise.
    assert np.mean(accuracy[:3]) > 0.9, lines
    assert "train: 12 samples of 4 prompts, 8 pairs" in "\n".join(lines)
    assert ProcessRewardModel.load(tmp_path / "prm", config.model).blocks == 1
    encoded = list((tmp_path / "runs" / "files" / "data").rglob("encoded/*.safetensors"))
    assert len(encoded) == 12


def test_encoded_videos_decode_to_themselves(scenes: tuple[list[str], np.ndarray]) -> None:
    family = open_generator(ModelConfig(**EMBEDDED))
    videos = torch.from_numpy(scenes[1]).permute(0, 1, 4, 2, 3).float() / 255
    latents = load_encoder(family, torch.device("cpu"))(videos)
    assert latents.shape[1:] == family.latent_shape
    # As the generator's own latents: of unit variance.
    assert 0.5 < float(latents.std()) < 1.5
    again = family.load_decoder(torch.device("cpu"))(latents)
    assert float((again - videos).square().mean()) < 0.01


def test_videos_of_another_size_are_fitted_and_foreign_vaes_noticed(
    scenes: tuple[list[str], np.ndarray], tiny_generator: Path, tmp_path: Path
) -> None:
    videos = torch.from_numpy(scenes[1][:1]).permute(0, 1, 4, 2, 3).float() / 255
    large = torch.nn.functional.interpolate(videos[0], scale_factor=2)[None]
    assert fitted(torch.cat([large, large], dim=1), 9, 32, 32).shape == videos.shape
    with pytest.raises(ConfigError, match=r"a video of 9 frames; the recipe's model.frames is 17"):
        fitted(videos, 17, 32, 32)
    # An untrained VAE stands for one whose latents are in another scale.
    family = open_generator(ModelConfig(**EMBEDDED | {"path": str(tiny_generator)}))
    with pytest.raises(ConfigError, match="does not come back from its decoder"):
        load_encoder(family, torch.device("cpu"))(videos)

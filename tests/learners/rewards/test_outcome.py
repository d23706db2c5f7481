"""Outcome reward models: losses, training of a real InternVL (tiny, random), saving and scoring."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from euphonium.config import BackboneConfig, OrmConfig, OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.outcome_model import OutcomeModel
from euphonium.rewards.registry import build_reward
from learners.engine.local import LocalEngine
from learners.rewards.outcome import OrmTraining, rao_kupper
from learners.rewards.preference import bradley_terry
from learners.rewards.training import fit
from orchestrator.commands.train_orm import train_orm
from tests.learners.rewards.tiny_backbone import build_backbone

CPU = torch.device("cpu")
PROMPTS = ["a red car moving left", "a blue cat on white background", "a red cat moving up", "a black car"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright videos are better; ties are equally bright. The last prompt is held out."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": [], "labels": []}
    for p, prompt in enumerate(PROMPTS):
        names = {}
        for sample, level in enumerate((60, 60, 190, 190)):
            noise = rng.integers(-30, 30, (3, 20, 24, 3))
            name = f"{p}_{sample}.npy"
            np.save(folder / name, (level + noise).astype(np.uint8))
            names[sample] = name
        part = rows["held_out" if p == len(PROMPTS) - 1 else "train"]
        part += [{"prompt": prompt, "winner": names[b], "loser": names[a]} for a in (0, 1) for b in (2, 3)]
        part += [{"prompt": prompt, "winner": names[a], "loser": names[a + 1], "tie": True} for a in (0, 2)]
        rows["labels"] += [{"prompt": prompt, "sample": names[i], "label": int(i > 1)} for i in range(4)]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipe(backbone: Path, videos: Path, folder: Path, objective: str = "bradley_terry", **optimizer: Any) -> OrmConfig:
    labels = objective == "bce"
    return OrmConfig(
        name="orm",
        output_dir=folder / "runs",
        target=folder / "orm",
        model=BackboneConfig(path=str(backbone), frames=2),
        preferences={
            "train": videos / ("labels.jsonl" if labels else "train.jsonl"),
            "held_out": None if labels else videos / "held_out.jsonl",
            "held_out_fraction": 0.25,
        },
        objective=objective,
        optimizer={
            "updates": 30, "pairs_per_update": 8, "pairs_per_micro_batch": 8, "learning_rate": 1e-2,
            "ema_decay": 0.8, "evaluate_every": 30, "checkpoint_every": 10, **optimizer,
        },
    )  # fmt: skip


def test_rao_kupper_probabilities_add_to_one_and_become_bradley_terry() -> None:
    gap = torch.linspace(-4, 4, 9)
    no, yes = torch.zeros(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
    won, lost, tied = (torch.exp(-rao_kupper(g, t, 2.5)) for g, t in ((gap, no), (-gap, no), (gap, yes)))
    torch.testing.assert_close(won + lost + tied, torch.ones(9))
    # A tie is likeliest between equals, (theta - 1) / (theta + 1) there.
    assert int(tied.argmax()) == 4
    torch.testing.assert_close(tied[4], torch.tensor(1.5 / 3.5))
    torch.testing.assert_close(rao_kupper(gap, no, 1 + 1e-6), bradley_terry(gap, torch.zeros(9)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", ["bradley_terry", "bradley_terry_ties", "bce"])
def test_training_separates_a_toy_set_and_its_model_scores_as_a_reward(
    objective: str, backbone: Path, videos: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = recipe(backbone, videos, tmp_path, objective)
    first = OrmTraining(config, CPU)
    batch = first.task.batch(0)
    with torch.no_grad():
        before = float(first.task.losses(first.model, batch, slice(0, 8)).mean())
    result = train_orm(config, lines.append)
    assert result["accuracy"] > 0.9, lines
    assert objective != "bce" or result["label_accuracy"] > 0.9
    assert lines[-1] == f"wrote {tmp_path / 'orm'}: reward type trained with options {{ path: {tmp_path / 'orm'} }}"
    reward = build_reward(
        OutcomeRewardConfig(
            name="orm",
            type="trained",
            options={"path": str(tmp_path / "orm"), "batch": 3},
        )
    )
    frames = np.stack([np.load(videos / f"{p}_{s}.npy") for p in range(3) for s in range(4)])
    clips = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
    scores = reward.score(clips, [PROMPTS[p] for p in range(3) for _ in range(4)]).view(3, 4)
    wins = scores[:, 2:, None] > scores[:, None, :2]
    assert float(wins.float().mean()) > 0.9
    trained = OutcomeModel.load(tmp_path / "orm")
    with torch.no_grad():
        after = float(first.task.losses(trained, batch, slice(0, 8)).mean())
    assert after < 0.6 * before
    if objective == "bradley_terry_ties":
        spread = (scores[:, 2] - scores[:, 3]).abs().mean() + (scores[:, 0] - scores[:, 1]).abs().mean()
        assert spread < (scores[:, 2:].mean() - scores[:, :2].mean())


def test_saved_folder_has_the_documented_layout(backbone: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, InternVLForConditionalGeneration

    model = OutcomeModel.from_backbone(BackboneConfig(path=str(backbone), frames=2))
    model.save(tmp_path, objective="bradley_terry")
    head = load_file(tmp_path / "head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {"weight": (1, 16), "bias": (1,)}
    again = InternVLForConditionalGeneration.from_pretrained(tmp_path / "backbone")
    theirs, ours = again.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a red car", add_special_tokens=False) == [4, 5, 7]
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["pooling"] == "last_token"
    assert description["video"]["image_tokens"] == [1, 2, 3]


def test_reward_of_a_video_does_not_depend_on_its_batch(backbone: Path) -> None:
    model = OutcomeModel.from_backbone(BackboneConfig(path=str(backbone), frames=2)).eval()
    clips = [model.frames_of(torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    prompts = ["a car", "a blue cat moving left on white background"]
    with torch.no_grad():
        both = model(**model.inputs(clips, prompts, CPU))
        alone = [model(**model.inputs([c], [p], CPU)) for c, p in zip(clips, prompts, strict=True)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert float((both[0] - both[1]).abs()) > 1e-4


def test_killed_and_resumed_training_ends_with_the_same_weights(backbone: Path, videos: Path, tmp_path: Path) -> None:
    config = recipe(backbone, videos, tmp_path, updates=5, checkpoint_every=2, evaluate_every=5)

    def run(folder: Path, die_in: int | None) -> dict[str, torch.Tensor]:
        training = OrmTraining(config, CPU)
        engine = LocalEngine(training.model, config.optimizer, CPU)
        batch = training.task.batch

        def dying(update: int) -> Any:
            if update == die_in:
                raise KeyboardInterrupt
            return batch(update)

        training.task.batch = dying  # type: ignore[method-assign]
        fit(engine, training.task, config.optimizer, folder, "mark", lambda _: None)
        return engine.whole("average")

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 3)
    resumed = run(tmp_path / "cut", None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(("trained", "expected"), [("all", True), ("language", False), ("head", False)])
def test_parts_that_are_not_trained_are_frozen(trained: str, expected: bool, backbone: Path, videos: Path) -> None:
    config = recipe(backbone, videos, Path("unused"))
    config = config.model_copy(update={"model": config.model.model_copy(update={"trained": trained})})
    model = OrmTraining(config, CPU).model
    tower, language = model.backbone.model.vision_tower, model.backbone.model.language_model
    assert all(p.requires_grad == expected for p in tower.parameters())
    assert all(p.requires_grad == (trained != "head") for p in language.parameters())
    assert all(p.requires_grad for p in model.head.parameters())


def test_mistakes_are_named(backbone: Path, videos: Path, tmp_path: Path, tiny_generator: Path) -> None:
    with pytest.raises(ConfigError, match="objective bce: it needs samples with labels"):
        OrmTraining(recipe(backbone, videos, tmp_path).model_copy(update={"objective": "bce"}), CPU)
    with pytest.raises(ConfigError, match=r"model.path: cannot load"):
        OutcomeModel.from_backbone(BackboneConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="clip_text_model model; this needs an InternVL"):
        OutcomeModel.from_backbone(BackboneConfig(path=str(tiny_generator / "text_encoder_2")))
    with pytest.raises(ConfigError, match="holds no outcome reward model"):
        OutcomeModel.load(tmp_path)
    spec = OutcomeRewardConfig(name="mine", type="trained", options={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"rewards.outcome \(mine\).options: .* holds no outcome reward model"):
        build_reward(spec)
    with pytest.raises(ConfigError, match=r"\(mine\).options: batch: input should be greater than 0"):
        build_reward(spec.model_copy(update={"options": {"path": str(tmp_path), "batch": 0}}))
    model = OutcomeModel.from_backbone(BackboneConfig(path=str(backbone), frames=2))
    with pytest.raises(ValueError, match="own tokens"):
        model.inputs([torch.zeros(2, 3, 28, 28, dtype=torch.uint8)], ["a <IMG_CONTEXT> car"], CPU)

"""Recipes of reward models: what ``validate`` says of them, and what ``train-prm`` and ``train-orm`` refuse."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from euphonium.config import OrmConfig, PrmConfig, RunConfig, dump_config, load_any_config
from euphonium.errors import ConfigError
from orchestrator.commands.cli import run_command
from orchestrator.commands.train_orm import train_orm
from orchestrator.commands.train_prm import train_prm
from tests.learners.rewards.tiny_backbone import build_backbone

MODEL = {"path": "euphonium/embedded/weights", "frames": 9, "height": 32, "width": 32, "max_prompt_tokens": 16}


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """A file of two prompts, with a pair each."""
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.zeros((9, 32, 32, 3), np.uint8))
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(f'{{"prompt": "{p}", "winner": "a.npy", "loser": "b.npy"}}' for p in ("one", "two")))
    return file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_backbone(tmp_path_factory.mktemp("backbone"))


def shared(folder: Path, preferences: Path) -> dict[str, Any]:
    return {
        "name": "training", "output_dir": str(folder / "runs"), "target": str(folder / "model"),
        "preferences": {"train": str(preferences), "held_out_fraction": 0.5}, "optimizer": {"updates": 10},
    }  # fmt: skip


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def validated(recipe: Path, capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What ``validate`` prints of a recipe that is good."""
    before = sorted(recipe.parent.iterdir())
    assert run_command(["validate", str(recipe), *overrides]) == 0
    assert sorted(recipe.parent.iterdir()) == before
    # Columns are as wide as the longest name.
    return re.sub("^# .*", lambda line: re.sub(" +", " ", line[0]), capfd.readouterr().out, flags=re.MULTILINE)


def test_recipes_of_every_command_are_validated(
    tmp_path: Path, preferences: Path, backbone: Path, make_config: Callable[..., RunConfig],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prm = written(tmp_path, shared(tmp_path, preferences) | {"model": MODEL, "blocks": 1})
    text = validated(prm, capfd)
    assert "trains a process reward model (train-prm)" in text
    assert "train pairs 1" in text
    assert "PFLOP training" in text
    config = load_any_config(prm)
    assert isinstance(config, PrmConfig)
    assert text.startswith(dump_config(config))
    orm = written(tmp_path, shared(tmp_path, preferences) | {"model": {"path": str(backbone), "frames": 2}})
    text = validated(orm, capfd)
    assert "trains an outcome reward model (train-orm)" in text
    assert "train 2 samples of 1 prompts, 1 pairs, 0 ties, 0 labels" in text
    assert isinstance(load_any_config(orm), OrmConfig)
    elsewhere = validated(orm, capfd, "model.path=someone/backbone")
    assert "someone/backbone (not here; train-orm downloads and checks it)" in elsewhere
    run = make_config()
    (tmp_path / "recipe.yaml").write_text(dump_config(run))
    assert load_any_config(tmp_path / "recipe.yaml") == run


def test_the_shipped_recipe_of_a_process_reward_model_is_good(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["validate", "recipes/embedded/prm.yaml", f"output_dir={tmp_path}", f"target={tmp_path}/x"]) == 0
    assert re.search("train prompts +95", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("prm", "blocks=99", "trunk of 99 blocks"),
        ("prm", "target=/dev/null/x", "target: /dev/null/x cannot be written to"),
        ("prm", "output_dir=/dev/null/x", "output_dir: /dev/null/x/training cannot be written to"),
        ("prm", "preferences.train=none.jsonl", "preferences.train: cannot read"),
        ("prm", "model.height=33", "model.height"),
        ("prm", "blocs=1", "unknown key 'blocs'; did you mean 'blocks'?"),
        ("prm", "learner={deepspeed: {stage: 2}}", "learner.deepspeed.stage: learners are made for stage 3"),
        ("orm", "learner={deepspeed: {stag: 2}}", "learner.deepspeed.stag: DeepSpeed's section"),
        ("orm", "target=/dev/null/x", "target: /dev/null/x cannot be written to"),
        ("orm", "preferences.train=none.jsonl", "preferences.train: cannot read"),
        ("orm", "objectiv=bce", "unknown key 'objectiv'; did you mean 'objective'?"),
        ("orm", "model.path=.", "model.path: cannot load"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    kind: str, override: str, message: str, tmp_path: Path, preferences: Path, backbone: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = {"model": MODEL, "blocks": 1} if kind == "prm" else {"model": {"path": str(backbone), "frames": 2}}
    recipe = written(tmp_path, shared(tmp_path, preferences) | own)
    assert run_command(["validate", str(recipe), override]) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


def test_variables_of_other_projects_are_refused(
    tmp_path: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROCESS_REWARD_ADVANTAGE_COEF", "1.0")
    common = shared(tmp_path, preferences)
    for train in (
        lambda: train_prm(PrmConfig.model_validate(common | {"model": MODEL, "blocks": 1}), print),
        lambda: train_orm(OrmConfig.model_validate(common | {"model": {"path": "none", "frames": 2}}), print),
    ):
        with pytest.raises(ConfigError, match=r"PROCESS_REWARD_ADVANTAGE_COEF=1.0 is rewards.process.weight here"):
            train()
    assert not (tmp_path / "runs").exists()

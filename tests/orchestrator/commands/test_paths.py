from collections.abc import Callable
from pathlib import Path

import pytest

from euphonium.config import PrmConfig, RunConfig, load_config
from orchestrator.commands.paths import absolute_paths


def test_files_of_a_run_are_absolute_and_hub_ids_stay(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = absolute_paths(make_config("model.path=someone/generator", "output_dir=runs", "prompts.train=train.txt"))
    assert config.model.path == "someone/generator"
    assert config.output_dir == tmp_path / "runs"
    assert config.prompts.train == tmp_path / "train.txt"
    (tmp_path / "someone" / "generator").mkdir(parents=True)
    assert absolute_paths(config).model.path == str(tmp_path / "someone" / "generator")
    assert absolute_paths(config).rewards.process == config.rewards.process
    assert config.prompts.embeddings is None
    stored = absolute_paths(make_config("prompts.embeddings=store"))
    assert stored.prompts.embeddings == tmp_path / "store"


def test_files_of_a_reward_training_are_absolute() -> None:
    root = Path.cwd()
    config = load_config("recipes/embedded/prm.yaml", ["output_dir=here", "target=there"], PrmConfig)
    config = absolute_paths(config)
    assert (config.output_dir, config.target) == (root / "here", root / "there")
    assert Path(config.model.path).is_absolute()

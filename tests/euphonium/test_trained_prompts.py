"""A reward model knows which prompts it was trained on, and a run is told of those that are its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.trained_prompts import FILE, trained_among, write_trained_prompts
from orchestrator.commands.launch import preflight


def test_prompts_are_known_by_their_words(tmp_path: Path) -> None:
    write_trained_prompts(tmp_path, ["a red  car", "a fish"])
    assert trained_among(tmp_path, ["a red car", "a blue car", "a red car"]) == ["a red car"]
    assert "red" not in (tmp_path / FILE).read_text(), "prompts themselves are not told"
    assert trained_among(tmp_path / "other", ["a red car"]) == []
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ConfigError, match="copy the reward model again, or remove it"):
        trained_among(tmp_path, ["a red car"])


def test_a_run_is_told_of_shared_prompts(
    make_config: Callable[..., RunConfig], tiny_prm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_prm, model)
    config = make_config(f"rewards.process.path={model}")
    write_trained_prompts(model, ["something else"])
    assert "prompts of reward models" not in preflight(config)
    seen = (tmp_path / "train.txt").read_text().splitlines()
    held_out = (tmp_path / "held_out.txt").read_text().splitlines()
    write_trained_prompts(model, [seen[0], *held_out])
    told = preflight(config)["prompts of reward models"]
    assert f"1 of 2 training prompts, such as {seen[0]!r}" in told
    assert "2 of 2 held-out prompts" in told
    assert str(model) in told
    assert any("hold a run's prompts out of their training" in message for message in caplog.messages)

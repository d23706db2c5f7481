"""Sampling outside of a run: how far guidance reaches on other grids, and the size of the clips."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from euphonium.config import RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from euphonium.generators.sample_size import SIZE_FILE
from orchestrator.commands.cli import app
from orchestrator.commands.inference import Drawing, evaluate_model, generate_clips, inference_guidance, open_policy
from orchestrator.state.checkpoints import Checkpoint, RunState
from tests.euphonium.generators.cases import CASES
from tests.euphonium.generators.tiny_pipelines import build_pipeline

SHIFT = 5
PROMPT = "a red car moving left on a white background"


def begins(k: int, steps: int) -> Fraction:
    """Time t at which step k of a shifted grid begins, exactly."""
    u = 1 - Fraction(k, steps)
    return 1 - SHIFT * u / (1 + (SHIFT - 1) * u)


@pytest.mark.parametrize("window", [(8, 16), (8, 15), (0, 4), (12, 13)])
@pytest.mark.parametrize("steps", [16, 30, 50])
def test_guidance_at_inference_lasts_as_long_as_the_rollouts_guided_steps(
    window: tuple[int, int], steps: int, make_config: Callable[..., RunConfig]
) -> None:
    sampler = (
        f"sampler={{law: dance, eta: 0.3, num_steps: 16, shift: {SHIFT}, guidance: {{scale: 1, window: {[*window]}}}}}"
    )
    config = make_config(sampler)
    guidance = inference_guidance(config)
    table = open_generator(config.model).ode_table(steps, config.sampler, guidance)
    first, end = begins(window[0], 16), begins(window[1], 16)
    assert table.guided_steps == [k for k in range(steps) if first <= begins(k, steps) < end]
    if steps == 16:
        assert table.guided_steps == list(range(*window))
    if window == (8, 16):
        assert table.guided_steps[-1] == steps - 1


def test_guidance_of_scale_0_cannot_be_kept(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="scale is 0"):
        inference_guidance(make_config("sampler.guidance={scale: 0}"))


def exported(config: RunConfig, target: Path) -> Path:
    family = open_generator(config.model)
    state = {name: tensor for file in family.transformer_files() for name, tensor in load_file(file).items()}
    family.export(state, target)
    return target


def shape(monkeypatch: pytest.MonkeyPatch, model: Path, output: Path, *options: str) -> tuple[int, ...]:
    """Frames, height and width of a clip that the command line draws."""
    drawn = []
    monkeypatch.setattr("orchestrator.report.pictures.save_samples", lambda _, __, videos, ___: drawn.append(videos))
    result = CliRunner().invoke(
        app, ["generate", str(model), "-p", PROMPT, "--steps", "1", "-o", str(output), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    (videos,) = drawn
    return tuple(videos.shape[1:4])


def test_an_export_is_drawn_from_in_its_runs_size_wherever_it_lies(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(make_config(), tmp_path / "far" / "away")
    assert json.loads((folder / SIZE_FILE).read_text()) == {"height": 32, "width": 32, "frames": 9}
    assert shape(monkeypatch, folder, tmp_path / "clips") == (9, 32, 32)
    options = ("--height", "48", "--width", "64", "--frames", "5")
    assert shape(monkeypatch, folder, tmp_path / "clips", *options) == (5, 48, 64)
    shutil.copytree(folder, tmp_path / "copy")
    assert shape(monkeypatch, tmp_path / "copy", tmp_path / "clips") == (9, 32, 32)


@pytest.mark.parametrize("held", ["", "[]", '{"height": 32}', '{"height": 32, "width": -1, "frames": 9}'])
def test_a_damaged_size_is_refused(held: str, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = exported(make_config(), tmp_path / "export")
    (folder / SIZE_FILE).write_text(held)
    with pytest.raises(ConfigError, match=r"euphonium\.json does not hold the size.*give --height"):
        generate_clips(folder, [PROMPT], tmp_path / "clips", Drawing(seed=0, steps=1))


def test_images_have_no_frames_and_image_to_video_needs_an_image(tmp_path: Path) -> None:
    for name in ("sd1", "skyreels"):
        build_pipeline(CASES[name].tiny).save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match="makes images"):
        generate_clips(tmp_path / "sd1", [PROMPT], tmp_path / "c", Drawing(seed=0, steps=1, size={"frames": 5}))
    with pytest.raises(ConfigError, match="--height: must be above 0"):
        generate_clips(tmp_path / "sd1", [PROMPT], tmp_path / "c", Drawing(seed=0, steps=1, size={"height": 0}))
    with pytest.raises(ConfigError, match="needs an image with each prompt"):
        generate_clips(tmp_path / "skyreels", [PROMPT], tmp_path / "c", Drawing(seed=0, steps=1))


def test_a_run_is_drawn_and_evaluated_in_other_sizes(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    state = RunState(iteration=1, next_group=2, world_size=1)
    monkeypatch.setattr(
        "orchestrator.commands.inference.open_checkpoint", lambda _: (Checkpoint(tmp_path, state), config)
    )
    monkeypatch.setattr(
        "orchestrator.commands.inference.open_policy", lambda c, config, **k: open_policy(c, config, base=True)
    )
    drawn: list[np.ndarray] = []
    monkeypatch.setattr("orchestrator.report.pictures.save_samples", lambda _, __, videos, ___: drawn.append(videos))
    size = {"height": 48, "frames": 5}
    generate_clips(tmp_path, [PROMPT], tmp_path / "clips", Drawing(seed=0, steps=1, size=size))
    assert drawn[0].shape == (1, 5, 48, 32, 3)
    assert set(evaluate_model(tmp_path, base=True, changes={}, size={"frames": 5})) >= {"icon", "motion", "total"}
    with pytest.raises(ConfigError, match=r"model\.height: .* needs a multiple of"):
        generate_clips(tmp_path, [PROMPT], tmp_path / "clips", Drawing(seed=0, steps=1, size={"height": 33}))


def test_a_time_window_is_half_open() -> None:
    from euphonium.dynamics import Guidance, shifted_sigmas

    table = StepTable.build("ode", shifted_sigmas(4, 1.0), guidance=Guidance(scale=1.0, time_window=(0.25, 0.75)))
    assert table.guided_steps == [1, 2]

"""The noise levels of a walk: the pipeline's own, or the linear grid."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from euphonium.config import ModelConfig, NoiseGridConfig, PairsConfig, SamplerConfig
from euphonium.dynamics import shifted_sigmas
from euphonium.errors import ConfigError
from euphonium.generators.described import describe_generator
from euphonium.generators.generator import Generator
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.cases import CASES, family_of
from tests.euphonium.generators.tiny_pipelines import Folders

PIPELINE = NoiseGridConfig()
SD3, WAN = "stabilityai/stable-diffusion-3.5-medium", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
HUNYUAN, FLUX = "hunyuanvideo-community/HunyuanVideo", "black-forest-labs/FLUX.1-dev"
EMBEDDED = "euphonium/embedded/weights"


def published(path: str, **changes: Any) -> Generator:
    guided = {HUNYUAN: 6.0, FLUX: 3.5}.get(path)
    size = {"height": 32, "width": 32, "frames": 9} if path == EMBEDDED else {"height": 512, "width": 512}
    return describe_generator(ModelConfig(**({"path": path, "embedded_guidance": guided} | size | changes)))


def with_scheduler(name: str, folders: Folders, target: Path, **changes: Any) -> Generator:
    """A tiny pipeline whose scheduler's file has other entries; None removes one."""
    shutil.copytree(folders(CASES[name].tiny), target)
    file = target / "scheduler" / "scheduler_config.json"
    entries = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    return open_generator(CASES[name].config(target))


@pytest.mark.parametrize(
    ("path", "first", "last"),
    [
        (SD3, [1.0, 0.9601], [0.4649, 0.2780, 0.0089, 0.0]),
        (WAN, [1.0, 0.9643], [0.5633, 0.4298, 0.2519, 0.0]),
        (HUNYUAN, [1.0, 0.9844], [0.75, 0.6364, 0.4375, 0.0]),
    ],
)
def test_the_levels_of_published_pipelines(path: str, first: list[float], last: list[float]) -> None:
    sigmas = published(path).noise_grid(10, PIPELINE).sigmas
    assert sigmas.dtype == torch.float64
    assert sigmas[:2].tolist() == pytest.approx(first, abs=5e-5)
    assert sigmas[-4:].tolist() == pytest.approx(last, abs=5e-5)
    # Exactly: the law flow_grpo tells pure noise from all else.
    assert float(sigmas[0]) == 1


@pytest.mark.parametrize("steps", [1, 6, 10, 30])
def test_the_embedded_generator_walks_the_linear_grid_to_the_last_bit(steps: int) -> None:
    grid = published(EMBEDDED).noise_grid(steps, PIPELINE)
    assert torch.equal(grid.sigmas, shifted_sigmas(steps, 3.0))
    assert grid.times is None


def test_flux_shifts_by_the_size() -> None:
    for side, shift in ((256, 1.65), (512, 1.88), (1024, 3.16)):
        sigmas = published(FLUX, height=side, width=side).noise_grid(12, PIPELINE).sigmas
        tokens = (side // 16) ** 2
        exact = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        torch.testing.assert_close(sigmas, shifted_sigmas(12, exact), atol=1e-6, rtol=0)
        assert exact == pytest.approx(shift, abs=5e-3)


def test_a_shift_overrides_that_of_the_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    five = NoiseGridConfig(grid="pipeline", shift=5.0)
    assert torch.equal(published(HUNYUAN).noise_grid(16, five).sigmas, shifted_sigmas(16, 5.0))
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    euler.set_timesteps(16)
    torch.testing.assert_close(published(SD3).noise_grid(16, five).sigmas.float(), euler.sigmas, atol=0, rtol=0)
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    unipc.set_timesteps(16)
    grid = published(WAN).noise_grid(16, five)
    torch.testing.assert_close(grid.sigmas.float(), unipc.sigmas, atol=2e-6, rtol=0)
    assert grid.times is not None
    assert (grid.times * 1000).round().tolist() == unipc.timesteps.tolist()


@pytest.mark.parametrize("path", [SD3, WAN, HUNYUAN, FLUX])
@pytest.mark.parametrize("law", ["dance", "flow_grpo", "sage", "cps"])
def test_all_samplers_of_a_model_walk_one_grid(path: str, law: Any) -> None:
    family, sampler = published(path), SamplerConfig(law=law, eta=0.5, num_steps=20)
    table = family.step_table(sampler)
    others = [family.ode_table(20, sampler), family.ode_table(20, PairsConfig(num_steps=20))]
    for other in others:
        assert torch.equal(table.sigmas, other.sigmas)
        assert torch.equal(table.times, other.times)
    # Begun at a noise level a millionth below 1, flow_grpo's first step would have a deviation of hundreds.
    assert 0 < float(table.std[0]) < 2
    assert not table.predicts_noise


def test_a_shift_alone_is_of_the_linear_grid() -> None:
    """What recipes meant before there was a choice, and what a run's own configuration says."""
    assert NoiseGridConfig(shift=3.0).grid == "linear"
    assert NoiseGridConfig.model_validate(NoiseGridConfig(shift=3.0).model_dump()).grid == "linear"
    assert NoiseGridConfig(shift=None).grid == "pipeline"
    for path in (FLUX, SD3, WAN, HUNYUAN):
        grid = published(path).noise_grid(10, NoiseGridConfig(shift=2.0))
        assert torch.equal(grid.sigmas, shifted_sigmas(10, 2.0))
        assert grid.times is None
    with pytest.raises(ValidationError, match="grid: linear needs a shift"):
        NoiseGridConfig(grid="linear")


def test_a_shift_that_the_size_decides_cannot_be_given() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.shift: .* shift from the size .* sampler\.grid to linear"):
        published(FLUX).noise_grid(10, NoiseGridConfig(grid="pipeline", shift=3.0))
    with pytest.raises(ConfigError, match=r"pairs\.shift: .* set pairs\.shift to null"):
        published(FLUX).noise_grid(10, PairsConfig(grid="pipeline", shift=3.0))


def test_schedulers_without_these_levels_are_refused(folders: Folders, tmp_path: Path) -> None:
    other = with_scheduler("flux", folders, tmp_path / "other", _class_name="DDIMScheduler")
    with pytest.raises(ConfigError, match=r"sampler\.grid: .* names a DDIMScheduler.*grid: linear and sampler\.shift"):
        other.noise_grid(4, PIPELINE)
    assert len(other.noise_grid(4, NoiseGridConfig(shift=1.0)).sigmas) == 5
    # HunyuanVideo's pipeline computes no shift, and fails with such a scheduler.
    dynamic = with_scheduler("hunyuan", folders, tmp_path / "dynamic", use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match=r"makes no noise levels for 4 steps .*mu"):
        dynamic.noise_grid(4, PIPELINE)
    # Its last level would be walked twice.
    endless = with_scheduler("wan", folders, tmp_path / "endless", final_sigmas_type="sigma_min")
    with pytest.raises(ConfigError, match=r"makes no noise levels for 4 steps \(sigmas must fall strictly"):
        endless.noise_grid(4, PIPELINE)
    shutil.copytree(folders("FluxPipeline"), tmp_path / "none")
    shutil.rmtree(tmp_path / "none" / "scheduler")
    with pytest.raises(ConfigError, match=r"scheduler_config\.json of .* cannot be read"):
        open_generator(CASES["flux"].config(tmp_path / "none")).noise_grid(4, PIPELINE)


def test_a_step_that_the_pipelines_grid_makes_impossible_is_refused() -> None:
    sampler = SamplerConfig(law="sage", eta=0.5, num_steps=200)
    with pytest.raises(ConfigError, match="sampler: step 0 of law 'sage'"):
        published(HUNYUAN).step_table(sampler)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        # Wan with the scheduler of Stable Diffusion 3, and that with levels of its own.
        ("wan", {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_flow_sigmas": None, "shift": 5.0}),
        ("sd3", {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}),
        ("flux", {"shift_terminal": 0.1}),
        ("sd3", {"use_karras_sigmas": True}),
        ("hunyuan", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 4.0}),
    ],
)
def test_a_scheduler_of_the_users_is_walked_as_the_pipeline_walks_it(
    name: str, entries: dict[str, Any], folders: Folders, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    from tests.euphonium.generators.test_families import call_of

    family = with_scheduler(name, folders, tmp_path / "pipeline", prediction_type="flow_prediction", **entries)
    index = tmp_path / "pipeline" / "model_index.json"
    written = json.loads(index.read_text())
    written["scheduler"][1] = json.loads((index.parent / "scheduler" / "scheduler_config.json").read_text())[
        "_class_name"
    ]
    index.write_text(json.dumps(written))
    pipeline = DiffusionPipeline.from_pretrained(family.folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**call_of(CASES[name], family, pipeline))
    table = family.ode_table(3, PIPELINE)
    torch.testing.assert_close(table.sigmas.float(), pipeline.scheduler.sigmas, atol=2e-6, rtol=0)
    theirs = pipeline.scheduler.timesteps.double() / 1000
    torch.testing.assert_close(table.times, theirs, atol=2e-6, rtol=0)


def test_the_tiny_wan_has_the_scheduler_of_the_published_one(folders: Folders) -> None:
    ours, theirs = family_of("wan", folders), published(WAN)
    for steps in (3, 10):
        assert torch.equal(ours.noise_grid(steps, PIPELINE).sigmas, theirs.noise_grid(steps, PIPELINE).sigmas)

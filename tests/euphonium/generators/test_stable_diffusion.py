"""Stable Diffusion 1 against the DDIM scheduler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from euphonium.config import NoiseGridConfig, SamplerConfig
from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from tests.euphonium.generators.cases import CASES, family_of
from tests.euphonium.generators.tiny_pipelines import Folders


def ddim_sampler(**changes: Any) -> SamplerConfig:
    return SamplerConfig(**({"law": "ddim", "eta": 1.0, "num_steps": 10} | changes))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stable_diffusion_steps_as_the_ddim_scheduler_does(eta: float, folders: Folders) -> None:
    from diffusers import DDIMScheduler

    family = family_of("sd1", folders)
    table = family.step_table(ddim_sampler(eta=eta))
    description = json.loads((family.folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(description, clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    x, output, z = (torch.randn(2, 4, 1, 3, 3, generator=generator) for _ in range(3))
    assert table.predicts_noise
    assert [round(float(time) * 1000) for time in table.times] == scheduler.timesteps.tolist()
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(table.sample(k, table.mean(k, x, output), z), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [3, 10, 50])
def test_the_noise_levels_are_those_of_the_pipelines_own_scheduler(steps: int, folders: Folders) -> None:
    """PNDM takes other steps between them, and its second level twice."""
    from diffusers import PNDMScheduler

    family = family_of("sd1", folders)
    scheduler = PNDMScheduler.from_pretrained(family.folder / "scheduler")
    scheduler.set_timesteps(steps)
    levels = list(dict.fromkeys(scheduler.timesteps.tolist()))
    table = family.ode_table(steps, NoiseGridConfig())
    assert [round(float(time) * 1000) for time in table.times] == levels
    alphas = torch.cat([scheduler.alphas_cumprod[levels], scheduler.final_alpha_cumprod.view(1)])
    torch.testing.assert_close(table.sigmas, (1 - alphas.double()).sqrt(), atol=1e-12, rtol=0)


def test_stable_diffusion_refuses_what_it_cannot_do(folders: Folders, tmp_path: Path) -> None:
    family = family_of("sd1", folders)
    with pytest.raises(ConfigError, match=r"sampler\.law: dance .* needs ddim"):
        family.step_table(SamplerConfig(law="dance", eta=0.3, num_steps=4))
    with pytest.raises(ConfigError, match=r"sampler\.shift"):
        family.step_table(ddim_sampler(shift=3.0))
    with pytest.raises(ConfigError, match="1000 noise levels"):
        family.step_table(ddim_sampler(num_steps=1000))
    with pytest.raises(ConfigError, match="U-Net"):
        ProcessRewardModel.from_generator(family, 1)
    with pytest.raises(ConfigError, match="ddim is for models that predict the noise"):
        family_of("flux", folders).step_table(ddim_sampler())
    shutil.copytree(family.folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ConfigError, match="'v_prediction'"):
        open_generator(CASES["sd1"].config(tmp_path / "v"))

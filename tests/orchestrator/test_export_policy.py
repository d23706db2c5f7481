"""Exports of adapters, and sampling protocols, without a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.errors import CheckpointError, ConfigError
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from learners.policy.checkpoint import POLICY_FILE
from orchestrator.export_policy import export_adapter, export_checkpoint
from orchestrator.generation.policies import inference_guidance

CPU = torch.device("cpu")
PROMPTS, SEEDS = ["a red car moving left on a white background", "a blue fish moving up on a gray background"], [5, 6]


@pytest.fixture
def trained_adapter(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> tuple[RunConfig, Path, np.ndarray]:
    """A run with adapters, a checkpoint of some adapter, and the samples it should draw."""
    config = tiny_recipe_file(tmp_path, "model.lora={rank: 4, alpha: 8}")
    worker = RolloutWorker(config, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in worker.published.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file({name: p.detach().contiguous() for name, p in worker.published.items()}, checkpoint / POLICY_FILE)
    return config, checkpoint, worker.evaluate(PROMPTS, SEEDS)


def _samples(config: RunConfig, folder: Path) -> np.ndarray:
    """What a generator on disk draws, without adapters."""
    model = config.model.model_copy(update={"path": str(folder), "lora": None})
    return RolloutWorker(config.model_copy(update={"model": model}), CPU).evaluate(PROMPTS, SEEDS)


def test_export_adds_the_adapter_into_the_layers(
    trained_adapter: tuple[RunConfig, Path, np.ndarray], tmp_path: Path
) -> None:
    config, checkpoint, expected = trained_adapter
    export_checkpoint(checkpoint, config, tmp_path / "merged")
    np.testing.assert_allclose(_samples(config, tmp_path / "merged"), expected, atol=1e-4)
    assert np.abs(_samples(config, Path(config.model.path)) - expected).max() > 1e-2
    with pytest.raises(CheckpointError, match="exists"):
        export_checkpoint(checkpoint, config, tmp_path / "merged")


def test_exported_adapter_is_loaded_by_diffusers(
    trained_adapter: tuple[RunConfig, Path, np.ndarray], tmp_path: Path
) -> None:
    from diffusers import HunyuanVideoPipeline

    config, checkpoint, expected = trained_adapter
    export_adapter(checkpoint, config, tmp_path / "adapter")
    pipeline = HunyuanVideoPipeline.from_pretrained(config.model.path, low_cpu_mem_usage=False)
    pipeline.load_lora_weights(tmp_path / "adapter")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    np.testing.assert_allclose(_samples(config, tmp_path / "fused"), expected, atol=1e-4)


def test_adapter_of_a_run_without_one_is_refused(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained all weights"):
        export_adapter(tmp_path, tiny_recipe_file(tmp_path), tmp_path / "adapter")


@pytest.mark.parametrize("strength", ["scale: 20", "scale: 1, normalise: noise"])
def test_inference_keeps_the_reward_gradient(
    strength: str, tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_recipe_file(tmp_path, f"sampler.guidance={{{strength}, window: [1, 3]}}")
    worker = RolloutWorker(config, CPU)
    assert config.rewards.process is not None
    prm = ProcessRewardModel.load(Path(config.rewards.process.path), config.model)
    guidance = inference_guidance(config)
    assert guidance.window is None
    assert guidance.time_window is not None

    def rewards(latents: np.ndarray) -> Tensor:
        states = torch.from_numpy(latents)
        sigma = torch.zeros(1)
        parts = [prm(states[i : i + 1], sigma, worker.conditioning(p)) for i, p in enumerate(PROMPTS)]
        return torch.cat(parts)

    guided = worker.evaluate(PROMPTS, SEEDS, lambda c, table, v: LocalRewards(prm, c, table.sigmas), guidance)
    with torch.no_grad():
        gained = rewards(guided) - rewards(worker.evaluate(PROMPTS, SEEDS))
    # Guided samples are drawn one by one: rounding alone moves the reward by 1e-7.
    assert bool((gained > 1e-3).all()), gained


def test_guidance_that_cannot_be_kept_is_refused(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not guided"):
        inference_guidance(tiny_recipe_file(tmp_path, "sampler.guidance=null"))
    with pytest.raises(ConfigError, match="guidance by beta"):
        inference_guidance(tiny_recipe_file(tmp_path, "sampler.law=flow_grpo", "sampler.guidance={beta: 0.5}"))

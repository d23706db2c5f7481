"""Adapters of every family, exported alone and loaded by the diffusers pipeline itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from euphonium.config import LoraConfig, RunConfig, load_config
from euphonium.errors import ConfigError
from euphonium.generators.lora import adapter_parameters, add_adapter
from learners.policy.checkpoint import POLICY_FILE
from orchestrator.commands.launch import preflight
from orchestrator.export_policy import export_adapter
from tests.euphonium.generators.cases import CASES, CPU, conditioning_of, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders, open_saved

LORA = LoraConfig(rank=2, alpha=3.0)
RECIPE = Path(__file__).parents[2] / "recipes" / "embedded" / "dancegrpo.yaml"


def run_of(name: str, folder: Path) -> RunConfig:
    """A run of some recipe with a family's model."""
    model = CASES[name].config(folder, lora=LORA)
    return load_config(RECIPE, []).model_copy(update={"model": model})


def trained(name: str, folders: Folders, checkpoint: Path) -> nn.Module:
    """A transformer with an adapter that changes something, saved as a checkpoint's policy."""
    transformer = family_of(name, folders).load_transformer(CPU)
    add_adapter(transformer, LORA)
    generator = torch.Generator().manual_seed(0)
    parameters = adapter_parameters(transformer)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    checkpoint.mkdir()
    save_file({n: p.detach().contiguous() for n, p in parameters.items()}, checkpoint / POLICY_FILE)
    return transformer.requires_grad_(False)


ABLE = [
    "flux", "flux2 dev", "qwen", "qwen edit", "z-image", "sd3", "ltx", "ltx2", "ltx2.3", "minimax h3", "wan", "wan i2v",
    "wan 2.2 i2v", "sd1", "hunyuan", "skyreels",
]  # fmt: skip


@pytest.mark.parametrize("name", ABLE)
def test_an_exported_adapter_changes_the_familys_own_pipeline_as_it_changed_the_policy(
    name: str, folders: Folders, tmp_path: Path
) -> None:
    family = family_of(name, folders)
    transformer = trained(name, folders, tmp_path / "checkpoint")
    export_adapter(tmp_path / "checkpoint", run_of(name, family.folder), tmp_path / "adapter")
    pipeline = open_saved(family.folder)
    conditioning, x, time = conditioning_of(family), noise(family), torch.tensor([0.3, 0.8])
    loaded = family.prepare(getattr(pipeline, family.backbone))
    with torch.no_grad():
        before = family.velocity(loaded, x, time, conditioning)
        pipeline.load_lora_weights(tmp_path / "adapter")
        after = family.velocity(loaded, x, time, conditioning)
        expected = family.velocity(transformer, x, time, conditioning)
    assert float((expected - before).abs().max()) > 1e-2
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-4)


def test_a_pipeline_without_adapters_is_refused_before_anything_is_written(folders: Folders, tmp_path: Path) -> None:
    trained("hunyuan 1.5", folders, tmp_path / "checkpoint")
    config = run_of("hunyuan 1.5", folders(CASES["hunyuan 1.5"].tiny))
    with pytest.raises(ConfigError, match=r"HunyuanVideo15Pipeline cannot load adapters; leave --adapter out"):
        export_adapter(tmp_path / "checkpoint", config, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("name", "can"), [("hunyuan 1.5", False), ("wan", True)])
def test_validate_says_how_an_adapter_can_be_exported(
    name: str, can: bool, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPE.parents[2])
    plan = preflight(run_of(name, folders(CASES[name].tiny)))
    assert ("export --adapter" in plan["adapter"]) == can
    assert ("leave --adapter out" in plan["adapter"]) != can

"""Adapters on every family's transformer."""

from __future__ import annotations

import pytest
import torch

from euphonium.config import LoraConfig
from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator
from euphonium.generators.lora import adapter_parameters, add_adapter
from tests.euphonium.generators.cases import CPU, conditioning_of, family_of, noise, one_a_family
from tests.euphonium.generators.tiny_pipelines import Folders


@one_a_family
def test_default_lora_targets_reach_attention(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    add_adapter(transformer, LoraConfig(rank=2))
    trained = adapter_parameters(transformer)
    for target in LoraConfig().targets:
        assert any(f".{target}.lora_A." in key for key in trained), target
    for key in (k for k in trained if ".lora_B." in k):
        torch.nn.init.normal_(trained[key])
    x, time = noise(family), torch.tensor([0.5, 0.95])
    family.velocity(transformer, x, time, conditioning_of(family)).square().mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for k, p in trained.items() if "to_v" in k)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nope"], r"'nope': no linear layer's name ends in it; "),
        (["to_q", "to_kk"], r"'to_kk': no linear layer's name ends in it; did you mean 'to_k'\?"),
        (["to_q", "to_out"], r"'to_out': .*to_out is no linear layer, but a ModuleList; did you mean 'to_out\.0'\?"),
        (["0"], r"is no linear layer"),
    ],
)
def test_targets_that_fit_no_linear_layer_are_refused_before_anything_is_loaded(
    targets: list[str], message: str, folders: Folders
) -> None:
    lora = LoraConfig(rank=2, targets=tuple(targets))
    with pytest.raises(ConfigError, match=message):
        check_generator(family_of("flux", folders, lora=lora))
    transformer = family_of("flux", folders).load_transformer(CPU)
    with pytest.raises(ConfigError, match=message):
        add_adapter(transformer, lora)

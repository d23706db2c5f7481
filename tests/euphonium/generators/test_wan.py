"""What only Wan has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from euphonium.config import LoraConfig
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import IMAGE, guided, negative, positive
from euphonium.generators.lora import adapter_parameters, add_adapter
from tests.euphonium.generators.cases import CPU, conditioning_of, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders


def test_wan_keeps_its_rotary_tables_exact(folders: Folders) -> None:
    from diffusers import WanTransformer3DModel

    family = family_of("wan", folders, dtype="bfloat16")
    exact = WanTransformer3DModel.from_config(family.transformer_config()).rope
    for transformer in (family.load_transformer(CPU), family.build_transformer().bfloat16()):
        torch.testing.assert_close(transformer.rope.freqs_cos, exact.freqs_cos, atol=1e-7, rtol=0)
        torch.testing.assert_close(transformer.rope.freqs_sin, exact.freqs_sin, atol=1e-7, rtol=0)
        assert transformer.to("meta").rope.freqs_cos.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wan", {"cfg_scale_2": 3.0}, r"model\.cfg_scale_2: .* has one transformer for all steps; leave it out"),
        ("wan", {"trained": "low_noise"}, r"model\.trained: .* has one transformer for all steps"),
        ("wan a14b", {"cfg_scale": None, "negative_prompt": ""}, r"model\.cfg_scale_2: it needs model\.cfg_scale"),
        ("wan", {"pipeline": "WanImageToVideoPipeline"}, r"model\.pipeline: .* has 4 input channels, and none for a"),
        ("wan", {"pipeline": "FluxPipeline"}, r"is a WanPipeline, .* leave it out, or set it to WanImageToVideoPipel"),
        ("flux", {"pipeline": "WanPipeline"}, r"is a FluxPipeline, which is not opened as a WanPipeline; leave it out"),
        ("wan i2v", {"max_prompt_tokens": 24}, r"model\.max_prompt_tokens: set it to 512"),
    ],
)
def test_what_a_model_of_wan_cannot_do_is_refused(
    name: str, changes: dict[str, Any], message: str, folders: Folders
) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of(name, folders, **changes)


def test_the_given_first_frame_is_kept_and_earns_no_gradient(folders: Folders) -> None:
    family = family_of("wan 2.2 i2v", folders)
    transformer, conditioning, x = family.load_transformer(CPU), conditioning_of(family), noise(family)
    first, time = conditioning[IMAGE], torch.tensor([0.7, 0.3])
    velocity = family.velocity(transformer, x, time, conditioning)
    # One step to time 0 arrives at the picture.
    torch.testing.assert_close((x - time.view(-1, 1, 1, 1, 1) * velocity)[:, :, :1], first, atol=1e-5, rtol=0)
    assert torch.equal(family.finish(x, conditioning)[:, :, :1], first)
    assert torch.equal(family.finish(x, conditioning)[:, :, 1:], x[:, :, 1:])
    of_first, of_others = (
        torch.autograd.grad(part.sum(), transformer.proj_out.weight, retain_graph=True, allow_unused=True)[0]
        for part in (velocity[:, :, :1], velocity[:, :, 1:])
    )
    assert of_first is None or not of_first.any()
    assert float(of_others.abs().max()) > 0


def test_each_time_passes_its_transformer(folders: Folders) -> None:
    family = family_of("wan a14b", folders)
    both = family.load_transformer(CPU)
    conditioning, x = conditioning_of(family), noise(family)
    alone = family_of("wan", folders)
    with torch.no_grad():
        mixed = family.velocity(both, x, torch.tensor([0.875, 0.874]), conditioning)
        for row, (name, time, scale) in enumerate([("transformer", 0.875, 4.0), ("transformer_2", 0.874, 3.0)]):
            outputs = [
                alone.network(both.get_submodule(name), x, torch.full((2,), time), side(conditioning))
                for side in (positive, negative)
            ]
            torch.testing.assert_close(mixed[row], guided(*outputs, scale)[row], atol=1e-5, rtol=1e-5)
    assert float((mixed[0] - mixed[1]).abs().max()) > 1e-2


@pytest.mark.parametrize(("trained", "part"), [("high_noise", "transformer."), ("low_noise", "transformer_2.")])
def test_one_of_two_transformers_is_trained(trained: str, part: str, folders: Folders, tmp_path: Path) -> None:
    family = family_of("wan a14b", folders, trained=trained)
    both = family.load_transformer(CPU)
    names = [name for name, _ in both.named_parameters() if family.trains(name)]
    assert names
    assert all(name.startswith(part) for name in names)
    time = torch.tensor([0.95, 0.5])
    family.velocity(both, noise(family), time, conditioning_of(family)).square().sum().backward()
    assert {name for name, p in both.named_parameters() if p.grad is not None} <= set(names)
    # An export has the other one as it was.
    state = dict(both.state_dict())
    family.export({name: state[name] + 1 for name in names}, tmp_path / "exported")
    exported = family_of("wan a14b", lambda _: tmp_path / "exported").load_transformer(CPU).state_dict()
    assert all(torch.equal(exported[name], state[name] + (name in names)) for name in state)
    add_adapter(both, LoraConfig(rank=2))
    assert all(name.startswith(part) for name in adapter_parameters(both))

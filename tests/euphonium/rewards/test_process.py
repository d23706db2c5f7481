"""Process reward models and the generator they belong to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from euphonium.config import ModelConfig, RunConfig
from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel, QueryAttention


def test_trunk_starts_from_the_generators_first_blocks(make_config: Callable[..., RunConfig]) -> None:
    family = open_generator(make_config().model)
    trunk = ProcessRewardModel.from_generator(family, 3).trunk.state_dict()
    weights = {n: t for file in family.transformer_files() for n, t in load_file(file).items()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trunk.items())
    assert any(name.startswith("single_transformer_blocks.0.") for name in trunk)
    assert not any(name.startswith("single_transformer_blocks.1.") for name in trunk)
    with pytest.raises(ConfigError, match="trunk of 7 blocks"):
        ProcessRewardModel.from_generator(family, 7)


def test_another_generators_latents_or_text_are_refused_by_name(
    make_config: Callable[..., RunConfig], tiny_prm: Path, tmp_path: Path
) -> None:
    model = make_config().model
    for part in ("vae", "text_encoder", "text_encoder_2"):
        other = tmp_path / part
        shutil.copytree(model.path, other)
        file = next((other / part).glob("*.safetensors"))
        tensors = load_file(file)
        name = min(tensors)
        save_file(tensors | {name: tensors[name] + 1}, file)
        with pytest.raises(ConfigError) as error:
            ProcessRewardModel.load(tiny_prm, model.model_copy(update={"path": str(other)}))
        message = str(error.value)
        assert f"{tiny_prm} was trained with another {part} than {other} has" in message
        assert "euphonium train-prm" in message
    # The transformer is what RL changes: it may differ.
    file = next((other / "transformer").glob("*.safetensors"))
    shutil.rmtree(other / "text_encoder_2")
    shutil.copytree(Path(model.path) / "text_encoder_2", other / "text_encoder_2")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert ProcessRewardModel.load(tiny_prm, model.model_copy(update={"path": str(other)})).blocks == 2


def test_folders_that_are_no_model_or_of_another_family_are_refused(
    make_config: Callable[..., RunConfig], tiny_prm: Path, tmp_path: Path
) -> None:
    model = make_config().model
    with pytest.raises(ConfigError, match=r"holds no process reward model \(prm.json is missing\)"):
        ProcessRewardModel.load(tmp_path, model)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_prm, copy)
    description = json.loads((copy / "prm.json").read_text())
    (copy / "prm.json").write_text(json.dumps(description | {"pipeline_class": "WanPipeline"}))
    with pytest.raises(ConfigError, match=r"was trained for a WanPipeline, and .* is a HunyuanVideoPipeline"):
        ProcessRewardModel.load(copy, model)
    (copy / "prm.json").write_text(json.dumps(description | {"blocks": 3}))
    with pytest.raises(ConfigError, match=r"model in .*copy cannot be used: it lacks .*transformer_blocks"):
        ProcessRewardModel.load(copy, model)


@pytest.mark.parametrize("damage", ["empty", "no object", "no head", "cut json", "cut weights", "no weights", "shape"])
def test_a_damaged_model_is_refused_with_and_without_reading_its_weights(
    damage: str, make_config: Callable[..., RunConfig], tiny_prm: Path, tmp_path: Path
) -> None:
    model, copy = make_config().model, tmp_path / "copy"
    shutil.copytree(tiny_prm, copy)
    ProcessRewardModel.check(copy, model)
    described, weights = copy / "prm.json", copy / "model.safetensors"
    description = json.loads(described.read_text())
    if damage in ("empty", "no object", "no head"):
        held = {"empty": {}, "no object": [], "no head": description | {"head": {"heads": 0}}}[damage]
        described.write_text(json.dumps(held))
    elif damage == "cut json":
        described.write_text(described.read_text()[:-9])
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no weights":
        weights.unlink()
    else:
        save_file(load_file(weights) | {"head.mlp.3.bias": torch.zeros(2)}, weights)
    for open_model in (ProcessRewardModel.check, ProcessRewardModel.load):
        with pytest.raises(ConfigError, match=r"rewards\.process\.path: .*copy cannot be used: .*copy it again"):
            open_model(copy, model)


def test_a_generator_without_the_trunks_weights_is_refused(tiny_generator: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_generator, tmp_path / "g")
    file = next((tmp_path / "g" / "transformer").glob("*.safetensors"))
    save_file({n: t for n, t in load_file(file).items() if not n.startswith("x_embedder")}, file)
    family = open_generator(ModelConfig(path=str(tmp_path / "g"), frames=9, height=32, width=32))
    with pytest.raises(ConfigError, match=r"lacks 2 weights of its first 1 blocks, for example x_embedder.proj.bias"):
        ProcessRewardModel.from_generator(family, 1)


def test_gradient_checkpointing_changes_nothing_but_memory(make_config: Callable[..., RunConfig]) -> None:
    family = open_generator(make_config().model)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)),
        "encoder_attention_mask": torch.ones(2, 5),
        "pooled_projections": torch.ones(2, 64),
    }
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ProcessRewardModel.from_generator(family, 2).for_training(gradient_checkpointing=checkpointing)
        model(x, torch.tensor([0.2, 0.7]), conditioning).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_pooling_by_folded_projections_is_multi_head_attention() -> None:
    torch.manual_seed(0)
    attention = QueryAttention(16, 4, batch_first=True)
    torch.nn.init.normal_(attention.in_proj_bias)
    queries, tokens = torch.randn(3, 16), torch.randn(2, 50, 16, requires_grad=True)
    expanded = queries.expand(2, -1, -1)
    known, _ = torch.nn.MultiheadAttention.forward(attention, expanded, tokens, tokens, need_weights=False)
    folded = attention(queries, tokens)
    torch.testing.assert_close(folded, known, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(known.square().sum(), [tokens, *attention.parameters()])
    found = torch.autograd.grad(folded.square().sum(), [tokens, *attention.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pooling_takes_no_projection_of_the_tokens() -> None:
    """Two products of the tokens with queries by heads, in place of two with all channels."""
    attention = QueryAttention(64, 4, batch_first=True)
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(2, 64), torch.randn(1, 5000, 64))
    assert counter.get_total_flops() < 2 * 5000 * 64 * 2 * (2 * 4) * 1.1

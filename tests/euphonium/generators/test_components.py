"""Damaged pipelines are refused by folder and component, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator, load_pipeline
from euphonium.generators.registry import open_generator
from orchestrator.commands.launch import preflight
from orchestrator.export_policy import export_checkpoint
from tests.euphonium.generators.cases import CASES, family_of, one_a_family
from tests.euphonium.generators.tiny_pipelines import Folders

Damage = Callable[[Path], None]


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def cut(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-64])


def cut_header(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:40])


def renamed_weight(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update(other=tensors.pop(min(tensors))))


def other_shape(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({min(tensors): torch.zeros(3, 5, 7)}))


def broken_json(folder: Path) -> None:
    for file in folder.glob("*config.json"):
        file.write_text(file.read_text()[:-20])


def no_json(folder: Path) -> None:
    for file in folder.glob("*config.json"):
        file.unlink()


def no_weights(folder: Path) -> None:
    weights(folder).unlink()


NETWORK_DAMAGE: list[Damage] = [
    shutil.rmtree, cut, cut_header, renamed_weight, other_shape, broken_json, no_json, no_weights,
]  # fmt: skip


@one_a_family
def test_whole_pipelines_of_every_family_pass(name: str, folders: Folders) -> None:
    check_generator(family_of(name, folders))


@pytest.mark.parametrize("damage", NETWORK_DAMAGE)
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_damaged_network_is_refused_by_folder_and_component(
    component: str, damage: Damage, folders: Folders, tmp_path: Path
) -> None:
    refused(folders, tmp_path, component, damage)


@pytest.mark.parametrize("damage", [shutil.rmtree, broken_json, no_json])
@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2", "scheduler"])
def test_a_damaged_tokenizer_or_scheduler_is_refused(
    component: str, damage: Damage, folders: Folders, tmp_path: Path
) -> None:
    refused(folders, tmp_path, component, damage)


def refused(folders: Folders, tmp_path: Path, component: str, damage: Damage) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders("FluxPipeline"), copy)
    damage(copy / component)
    with pytest.raises(ConfigError) as caught:
        check_generator(open_generator(CASES["flux"].config(copy)))
    message = str(caught.value)
    assert str(copy) in message
    assert component in message
    assert "download or copy" in message
    assert "\n" not in message


def test_a_missing_shard_and_an_index_that_lies_are_refused(folders: Folders, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    source = tmp_path / "source"
    shutil.copytree(folders("FluxPipeline"), source)
    network = FluxTransformer2DModel.from_pretrained(source / "transformer")
    shutil.rmtree(source / "transformer")
    network.save_pretrained(source / "transformer", max_shard_size="60KB")
    check_generator(open_generator(CASES["flux"].config(source)))
    (index,) = (source / "transformer").glob("*.index.json")
    first, second, *_ = sorted((source / "transformer").glob("*.safetensors"))

    listed = json.loads(index.read_text())
    moved = next(name for name, shard in listed["weight_map"].items() if shard == first.name)
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {moved: second.name}}))
    with pytest.raises(ConfigError, match=rf"component transformer of .*: {second.name} lacks {moved}"):
        check_generator(open_generator(CASES["flux"].config(source)))

    index.write_text(json.dumps(listed))
    first.unlink()
    with pytest.raises(ConfigError, match=rf"component transformer of .*{first.name} is missing"):
        check_generator(open_generator(CASES["flux"].config(source)))


def test_an_index_of_unknown_classes_is_refused(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders("FluxPipeline"), copy)
    index = json.loads((copy / "model_index.json").read_text())
    for entry in (["os", "system"], ["transformers", "NoSuchEncoder"], ["transformers"]):
        (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder": entry}))
        with pytest.raises(ConfigError, match=r"the component text_encoder of .* cannot be opened"):
            check_generator(open_generator(CASES["flux"].config(copy)))


def test_validate_and_export_look_at_every_component(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    preflight(config)
    copy = tmp_path / "copy"
    shutil.copytree(config.model.path, copy)
    cut(copy / "text_encoder_2")
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(copy)})})
    with pytest.raises(ConfigError, match=r"component text_encoder_2 of .* is missing, cut or damaged"):
        preflight(config)
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "export"
    checkpoint.mkdir()
    (tensors,) = (copy / "transformer").glob("*.safetensors")
    shutil.copy(tensors, checkpoint / "policy.safetensors")
    with pytest.raises(ConfigError, match="component text_encoder_2"):
        export_checkpoint(checkpoint, config, target)
    assert not target.exists()


def test_a_component_that_only_the_index_knows_is_refused_with_the_index(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folders("FluxPipeline"), copy)
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace('"text_encoder_2"', '"teyt_encoder_2"'))
    with pytest.raises(
        ConfigError, match=r"component teyt_encoder_2 of .*: model_index\.json names it, but its folder"
    ):
        load_pipeline(copy)

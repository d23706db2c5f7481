"""Pipelines on disk: found, marked, copied with other weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.described import describe_generator
from euphonium.generators.folder import PipelineFolder
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.cases import CASES
from tests.euphonium.generators.tiny_pipelines import Folders


def test_an_export_holds_no_old_weights(folders: Folders, tmp_path: Path) -> None:
    source = tmp_path / "transformer-hub"
    shutil.copytree(folders("FluxPipeline"), source)
    for copy in ("flux1-dev.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/x.bin"):
        (source / copy).write_bytes(b"old")
    (source / "LICENSE.md").write_text("terms")
    family = open_generator(CASES["flux"].config(source))
    assert [file.name for file in family.transformer_files()] == ["diffusion_pytorch_model.safetensors"]
    family.export(load_file(family.transformer_files()[0]), tmp_path / "exported")
    assert (tmp_path / "exported" / "LICENSE.md").is_file()
    assert (tmp_path / "exported" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (tmp_path / "exported" / "flux1-dev.safetensors").exists()
    assert sorted(f.name for f in (tmp_path / "exported" / "transformer").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def model_at(path: Path | str) -> ModelConfig:
    return CASES["flux"].config(Path(path)).model_copy(update={"path": str(path)})


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    refused = rf"model\.path: \./nowhere/else is neither a folder nor a hub id .* relative to {re.escape(os.getcwd())}"
    with pytest.raises(ConfigError, match=refused):
        PipelineFolder.find(model_at("./nowhere/else"))
    with pytest.raises(ConfigError, match=refused):
        describe_generator(model_at("./nowhere/else"))
    with pytest.raises(
        ConfigError, match=r"holds no diffusers pipeline \(model_index\.json is missing, and so is modular_"
    ):
        PipelineFolder.find(model_at(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ConfigError, match=r"is a NoSuchPipeline, for which there is no adapter; supported: Hunyuan"):
        open_generator(model_at(tmp_path))


def test_a_mark_covers_configuration_and_both_ends_of_every_weight_file(tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    for name in names:
        (vae / name).write_bytes(bytes(3 << 20))
    pipeline = PipelineFolder(tmp_path)
    assert [file.name for file in pipeline.weight_files("vae")] == names
    marks = {pipeline.fingerprint("vae")}
    for name, place in ((names[0], 0), (names[0], -1), (names[1], 0), (names[1], -1)):
        content = bytearray((vae / name).read_bytes())
        content[place] = 1
        (vae / name).write_bytes(content)
        marks.add(pipeline.fingerprint("vae"))
    (vae / "config.json").write_text('{"latent_channels": 4}')
    marks.add(pipeline.fingerprint("vae"))
    assert len(marks) == 6
    # Copies in another precision are not what is loaded.
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    assert pipeline.fingerprint("vae") in marks


def test_a_modular_pipelines_index_says_the_classes_alone(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders("MiniMaxH3ModularPipeline"), copy)
    index = PipelineFolder.find(model_at(copy)).index()
    assert index["transformer"] == ["diffusers", "MiniMaxH3Transformer3DModel"]
    # A pipeline that is not modular keeps its own index, whatever lies beside it.
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert PipelineFolder(copy).index() == {"_class_name": "FluxPipeline"}
    (copy / "model_index.json").unlink()
    (copy / "modular_model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"modular_model_index\.json of .* cannot be read .*download or copy"):
        open_generator(model_at(copy))
    (copy / "modular_model_index.json").write_text(json.dumps({"_class_name": "AnimaModularPipeline"}))
    with pytest.raises(ConfigError, match=r"by its modular_model_index\.json .* is a AnimaModularPipeline, for which"):
        open_generator(model_at(copy))


def test_of_a_modular_repository_only_what_is_opened_is_downloaded(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it lie the model's own code with all weights once more, and the transformer of another task."""
    asked: list[list[str]] = []

    def snapshot(name: str, *, allow_patterns: list[str], **more: object) -> str:
        asked.append(allow_patterns)
        return str(folders("MiniMaxH3ModularPipeline"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    PipelineFolder.find(model_at("MiniMaxAI/some-model"))
    indices, wanted = asked
    assert indices == ["model_index.json", "modular_model_index.json"]
    assert {"transformer/*", "vae/*", "audio_vae/*", "text_encoder/*", "scheduler/*", "audio_scheduler/*"} <= set(
        wanted
    )
    assert not {"transformer_ref/*", "*/*"} & set(wanted)

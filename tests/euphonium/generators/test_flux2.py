"""What only FLUX.2 has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator
from orchestrator.commands.preprocess import open_encoders
from tests.euphonium.generators.cases import CPU, PROMPTS, family_of
from tests.euphonium.generators.tiny_pipelines import Folders


def test_a_distilled_model_takes_no_guidance(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders("Flux2KleinPipeline"), tmp_path / "distilled")
    index = tmp_path / "distilled" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    with pytest.raises(ConfigError, match=r"model\.cfg_scale: by its model_index\.json .* is distilled.*leave it out"):
        family_of("flux2 klein", lambda _: tmp_path / "distilled")
    assert family_of("flux2 klein without CFG", lambda _: tmp_path / "distilled").config.cfg_scale is None


def test_its_shift_depends_on_size_and_number_of_steps(folders: Folders) -> None:
    from euphonium.config import NoiseGridConfig

    small = family_of("flux2 klein", folders)
    large = family_of("flux2 klein", folders, height=64, width=64)
    levels = {
        (steps, name): float(family.noise_grid(steps, NoiseGridConfig()).sigmas[1:-1].mean())
        for steps in (4, 50)
        for name, family in (("small", small), ("large", large))
    }
    assert levels[50, "large"] > levels[50, "small"]
    assert len(set(levels.values())) == 4


def test_the_tokenizer_of_dev_is_opened_where_the_index_names_its_processor(folders: Folders, tmp_path: Path) -> None:
    """As in the published folder: the processor reads pictures as well, for which it needs torchvision."""
    shutil.copytree(folders("Flux2Pipeline"), tmp_path / "published")
    index = tmp_path / "published" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["transformers", "PixtralProcessor"]}))
    family = family_of("flux2 dev", lambda _: tmp_path / "published")
    check_generator(family)
    generator, _ = open_encoders(family.config)
    for prompt in PROMPTS:
        own, other = (f.load_prompt_encoder(CPU)([prompt]) for f in (generator, family_of("flux2 dev", folders)))
        assert torch.equal(own["encoder_hidden_states"], other["encoder_hidden_states"])

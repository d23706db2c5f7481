"""What only FLUX.2 has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from euphonium.errors import ConfigError
from tests.euphonium.generators.cases import family_of
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

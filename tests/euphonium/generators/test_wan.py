"""What only Wan has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.cases import CASES, CPU, family_of
from tests.euphonium.generators.tiny_pipelines import Folders


def test_wan_keeps_its_rotary_tables_exact(folders: Folders) -> None:
    from diffusers import WanTransformer3DModel

    family = family_of("wan", folders, dtype="bfloat16")
    exact = WanTransformer3DModel.from_config(family.transformer_config()).rope
    for transformer in (family.load_transformer(CPU), family.build_transformer().bfloat16()):
        torch.testing.assert_close(transformer.rope.freqs_cos, exact.freqs_cos, atol=1e-7, rtol=0)
        torch.testing.assert_close(transformer.rope.freqs_sin, exact.freqs_sin, atol=1e-7, rtol=0)
        assert transformer.to("meta").rope.freqs_cos.device.type == "meta"


def test_two_transformers_are_refused(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders("WanPipeline"), tmp_path / "wan22")
    file = tmp_path / "wan22" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boundary_ratio": 0.9}))
    with pytest.raises(ConfigError, match="two transformers"):
        open_generator(CASES["wan"].config(tmp_path / "wan22"))

"""Image-to-video: first frames, and the lack of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.cases import CASES, CPU, PROMPTS, family_of, noise, pictures
from tests.euphonium.generators.tiny_pipelines import Folders

ROOT = Path(__file__).parents[3]


def test_the_first_frame_matters(folders: Folders) -> None:
    family = family_of("skyreels", folders)
    transformer, x, time = family.load_transformer(CPU), noise(family, 1), torch.tensor([0.5])
    outputs = []
    for file in pictures(family).values():
        conditioning = family.prompt_encoder(CPU, {PROMPTS[0]: file})(PROMPTS[:1])
        with torch.no_grad():
            outputs.append(family.velocity(transformer, x, time, conditioning))
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2


def test_a_prompt_without_its_image_is_refused(folders: Folders, tmp_path: Path) -> None:
    family = family_of("skyreels", folders)
    with pytest.raises(ConfigError, match=r"'a red car' has no image.*\.jsonl"):
        family.prompt_encoder(CPU, {})(PROMPTS[:1])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken\.png"):
        family.prompt_encoder(CPU, {PROMPTS[0]: tmp_path / "broken.png"})(PROMPTS[:1])


def test_a_family_of_texts_says_that_it_takes_no_image(folders: Folders) -> None:
    family = family_of("flux", folders)
    with pytest.raises(ConfigError, match=r"model\.path: .* is a FluxPipeline, which takes no image"):
        family.load_image_encoder(CPU)


def test_the_folder_that_the_documentation_puts_together_opens(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (ROOT / "docs" / "models.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders("HunyuanSkyreelsImageToVideoPipeline") / "transformer", "Skywork/SkyReels-V1-Hunyuan-I2V")
    shutil.copytree(folders("HunyuanVideoPipeline"), "hunyuanvideo-community/HunyuanVideo")
    exec(code, {})
    recipe = yaml.safe_load((ROOT / "recipes" / "skyreels-i2v" / "dancegrpo.yaml").read_text())
    family = open_generator(CASES["skyreels"].config(Path(recipe["model"]["path"])))
    check_generator(family)
    assert family.takes_image

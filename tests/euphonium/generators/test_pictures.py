"""First frames of image-to-video: upright, there, and readable before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from euphonium.config import PromptsConfig
from euphonium.errors import ConfigError
from euphonium.generators.pictures import check_pictures, open_picture
from tests.euphonium.generators.cases import family_of
from tests.euphonium.generators.tiny_pipelines import Folders

ORIENTATION = 0x0112


def picture(file: Path, orientation: int | None = None) -> Path:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 30:] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image.save(file, quality=95, exif=exif)
    return file


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    assert open_picture(picture(tmp_path / "plain.jpg")).size == (40, 20)
    upright = open_picture(picture(tmp_path / "turned.jpg", orientation=6))
    assert upright.size == (20, 40)
    # Turned clockwise by a quarter, the bright end is below.
    levels = np.asarray(upright).mean(axis=(1, 2))
    assert levels[:28].max() < 30
    assert levels[32:].min() > 225


def prompts(folder: Path, name: str, lines: list[dict[str, str]]) -> Path:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_pictures_that_are_missing_or_cannot_be_read_are_refused_beforehand(folders: Folders, tmp_path: Path) -> None:
    family = family_of("skyreels", folders)
    picture(tmp_path / "good.jpg")
    train = prompts(tmp_path, "train.jsonl", [{"prompt": "a car", "image": "good.jpg"}])
    held_out = prompts(tmp_path, "held_out.jsonl", [{"prompt": "a fish", "image": "good.jpg"}])
    check_pictures(family, PromptsConfig(train=train, evaluation=held_out))

    prompts(tmp_path, "held_out.jsonl", [{"prompt": "a fish"}])
    with pytest.raises(ConfigError, match=r"prompts\.evaluation: .*held_out\.jsonl: 1 prompts have no image.*'a fish'"):
        check_pictures(family, PromptsConfig(train=train, evaluation=held_out))
    check_pictures(family_of("wan", folders), PromptsConfig(train=train, evaluation=held_out))

    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "good.jpg").read_bytes()[:400])
    prompts(tmp_path, "held_out.jsonl", [{"prompt": "a fish", "image": "cut.jpg"}])
    with pytest.raises(ConfigError, match=r"cannot read the image .*cut\.jpg: .*; replace it"):
        check_pictures(family, PromptsConfig(train=train, evaluation=held_out))

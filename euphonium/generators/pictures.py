"""Picture files of prompts: read upright, and checked before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageOps

from euphonium.config import PromptsConfig
from euphonium.errors import ConfigError
from euphonium.generators.generator import Generator
from euphonium.prompt_files import prompt_images, read_prompt_file

# Of more pictures, so many are decoded in full; of the others the headers are read.
DECODED = 1000


def open_picture(file: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF data say that it is to be looked at.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error


def cut_picture(file: Path, height: int, width: int) -> Image.Image:
    """A picture of a size, cut to its proportions in the middle; raises as :func:`open_picture` does."""
    from diffusers.image_processor import VaeImageProcessor

    cut: Image.Image = VaeImageProcessor().resize(open_picture(file), height=height, width=width, resize_mode="crop")
    return cut


def check_pictures(generator: Generator, prompts: PromptsConfig) -> None:
    """Checks that each of a run's prompts has a picture that can be read, if the generator takes one.

    Raises:
        ConfigError: a prompt has no picture, or the picture cannot be read; names file and remedy.
    """
    if not generator.takes_image:
        return
    files = [("prompts.train", prompts.train), ("prompts.evaluation", prompts.evaluation)]
    images = prompt_images([file for _, file in files])
    for field, file in files:
        require_pictures(
            generator, [prompt.text for prompt in read_prompt_file(file, field)], images, f"{field}: {file}"
        )


def require_pictures(generator: Generator, prompts: Iterable[str], images: Mapping[str, Path], where: str) -> None:
    """Checks the pictures of some prompts; raises as :func:`check_pictures`, with ``where`` in front."""
    without = [prompt for prompt in prompts if prompt not in images]
    if without:
        raise ConfigError(
            f"{where}: {len(without)} prompts have no image, for example {without[0]!r}, and a "
            f"{generator.pipeline_class} starts from one; give prompts in .jsonl files, one "
            '{"prompt": ..., "image": ...} a line'
        )
    pictures = sorted({images[prompt] for prompt in prompts})
    stride = max(1, len(pictures) // DECODED)
    for number, picture in enumerate(pictures):
        if number % stride == 0:
            open_picture(picture)
        else:
            _read_header(picture)


def _read_header(file: Path) -> None:
    try:
        with Image.open(file):
            pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(f"prompts: cannot read the image {file}: {error}; replace it, or take its prompt out")

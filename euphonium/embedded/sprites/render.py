"""Renders clips of scenes: the data of the embedded generator and the ground truth of the verifiers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from euphonium.embedded.sprites.world import (
    BACKGROUNDS,
    DIRECTIONS,
    FRAMES,
    ICONS,
    OFF_MIDDLE,
    SIZE,
    SPEED,
    SPRITE,
    Scene,
)

ATLAS = Path(__file__).parent / "icons" / "atlas.png"


@lru_cache(maxsize=1)
def icon_sprites() -> Tensor:
    """Premultiplied RGBA sprites of all icons, in the order of ``ICONS``.

    Returns:
        float32 ``[icons, 4, SPRITE, SPRITE]`` in [0, 1].
    """
    with Image.open(ATLAS) as image:
        sheet = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255.0
    tile = sheet.shape[0]
    tiles = torch.from_numpy(sheet).reshape(tile, len(ICONS), tile, 4).permute(1, 3, 0, 2)
    premultiplied = torch.cat([tiles[:, :3] * tiles[:, 3:], tiles[:, 3:]], dim=1)
    return functional.interpolate(premultiplied, size=(SPRITE, SPRITE), mode="area")


def composite(sprites: Tensor, positions: Tensor, backgrounds: Tensor) -> Tensor:
    """Draws one sprite a frame over a plain background, at sub-pixel positions.

    Args:
        sprites: premultiplied RGBA ``[batch, 4, SPRITE, SPRITE]``.
        positions: top-left corners ``[batch, frames, 2]`` as (x, y) in pixels.
        backgrounds: RGB ``[batch, 3]`` in [0, 1].

    Returns:
        float32 ``[batch, frames, 3, SIZE, SIZE]`` in [0, 1].
    """
    batch, frames, _ = positions.shape
    axis = torch.arange(SIZE, dtype=torch.float32)
    # grid_sample wants, for every output pixel, where in the sprite it lies, in [-1, 1] from edge to edge.
    x = (axis - positions[..., :1] + 0.5) * (2 / SPRITE) - 1
    y = (axis - positions[..., 1:] + 0.5) * (2 / SPRITE) - 1
    grid = torch.stack(
        [x[:, :, None, :].expand(-1, -1, SIZE, -1), y[:, :, :, None].expand(-1, -1, -1, SIZE)], dim=-1
    ).flatten(0, 1)
    tiled = sprites[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    drawn = functional.grid_sample(tiled, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    drawn = drawn.unflatten(0, (batch, frames))
    return drawn[:, :, :3] + (1 - drawn[:, :, 3:]) * backgrounds[:, None, :, None, None]


def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Renders one clip a scene, with random speed, along a path near the middle.

    Args:
        scenes: what to draw.
        generator: source of the random positions and speeds.

    Returns:
        float32 ``[len(scenes), FRAMES, 3, SIZE, SIZE]`` in [0, 1].
    """
    icons = list(ICONS)
    sprites = icon_sprites()[[icons.index(scene.icon) for scene in scenes]]
    direction = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes], dtype=torch.float32)
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])
    free = SIZE - SPRITE
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * torch.rand(len(scenes), 1, generator=generator)
    travel = (FRAMES - 1) * speed * direction
    along = direction.abs()
    off = OFF_MIDDLE[0] * along + OFF_MIDDLE[1] * (1 - along)
    middle = free / 2 + off * (2 * torch.rand(len(scenes), 2, generator=generator) - 1)
    start = middle - travel / 2
    steps = torch.linspace(0, 1, FRAMES)[None, :, None]
    return composite(sprites, start[:, None] + steps * travel[:, None], background)

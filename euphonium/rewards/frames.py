"""Frames of a batch of videos: choosing, quantising, resizing and cropping them, in torch alone.

Vision libraries prepare 8-bit images with Pillow. These functions take the project's float videos to the same pixels,
up to rounding, without the detour and on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def check_videos(videos: Tensor, prompts: Sequence[str], least_frames: int = 1) -> None:
    """Checks that the input is a batch of videos with a prompt each.

    Raises:
        ValueError: another shape than ``[batch, frames, 3, height, width]``, too few frames, or not one prompt each.
    """
    if videos.dim() != 5 or videos.shape[2] != 3:
        raise ValueError(f"expected videos [batch, frames, 3, height, width], got {list(videos.shape)}")
    if len(prompts) != len(videos):
        raise ValueError(f"{len(videos)} videos came with {len(prompts)} prompts")
    if videos.shape[1] < least_frames:
        raise ValueError(f"this reward needs at least {least_frames} frames, got {videos.shape[1]}")


def spread(frames: int, count: int) -> list[int]:
    """Indices of at most ``count`` of ``frames`` frames, evenly spread, the first and the last among them."""
    if count >= frames:
        return list(range(frames))
    if count == 1:
        return [frames // 2]
    return [round(index * (frames - 1) / (count - 1)) for index in range(count)]


def quantised(videos: Tensor) -> Tensor:
    """Values in [0, 1] as the levels 0 to 255 of an 8-bit picture, still floating point."""
    return videos.float().clamp(0, 1).mul(255).round()


def as_bytes(video: Tensor) -> NDArray[np.uint8]:
    """``[frames, 3, height, width]`` in [0, 1] as a contiguous numpy uint8 array ``[frames, height, width, 3]``."""
    pictures: NDArray[np.uint8] = quantised(video).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures


def resized(images: Tensor, height: int, width: int, levels: bool = True) -> Tensor:
    """Bicubic with antialiasing, as Pillow does it.

    Args:
        images: ``[count, 3, h, w]``.
        height: of the result.
        width: of the result.
        levels: ``images`` are 0 to 255 and so is the result: clamped and rounded, as 8-bit pictures are.
    """
    # Pillow resizes rows, rounds and clips to 8 bits, and then resizes columns: overshoots at edges are cut twice.
    for target in ((images.shape[-2], width), (height, width)) if levels else ((height, width),):
        if images.shape[-2:] != target:
            images = functional.interpolate(images, target, mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255) if levels else images
    return images


def cropped(images: Tensor, height: int, width: int) -> Tensor:
    """The centre ``[count, 3, height, width]`` of larger pictures."""
    top = (images.shape[-2] - height) // 2
    left = (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(image / 255 - mean) / std`` of levels 0 to 255, channel by channel."""
    shape = (1, 3, 1, 1)
    return (images / 255 - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)

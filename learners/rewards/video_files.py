"""Reads the frames of video files: GIFs, still images, numpy arrays and, with PyAV, mp4 and similar formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from euphonium.errors import ConfigError

Frames = NDArray[np.uint8]

PILLOW = {".gif", ".png", ".jpg", ".jpeg", ".webp"}
PYAV = {".mp4", ".webm", ".mov", ".mkv", ".avi"}


def read_frames(path: Path) -> Frames:
    """Reads all frames of a video, uint8 ``[frames, height, width, 3]``.

    Args:
        path: an image or GIF, a ``.npy`` of uint8 frames, or a video that PyAV decodes.

    Raises:
        ConfigError: the file cannot be read; names it, and what is wrong.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        frames = np.load(path, allow_pickle=False)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ConfigError(
                f"{path}: holds {frames.dtype} {frames.shape}; frames are uint8 [frames, height, width, 3]"
            )
        return np.asarray(frames)
    if suffix in PILLOW:
        from PIL import Image, ImageSequence

        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    if suffix in PYAV:
        return _decoded(path)
    raise ConfigError(f"{path}: {suffix or 'a file without ending'} is no kind of video that can be read here; known "
                      f"are .npy, {', '.join(sorted(PILLOW | PYAV))}")  # fmt: skip


def _decoded(path: Path) -> Frames:
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"{path}: reading it needs PyAV: pip install 'euphonium[video]'") from error
    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: cannot be decoded as a video: {error}") from error

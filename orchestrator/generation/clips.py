"""Clips as files: mp4, GIF, PNG or a folder of frames, each written whole or not at all, and read back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from euphonium.errors import ConfigError
from euphonium.files import written_aside
from euphonium.generators.sound import Sound
from orchestrator.report.pictures import enlarge

Frames = NDArray[np.uint8]
Format = Literal["mp4", "gif", "png", "frames"]
# libx264's constant quality; 18 is visually lossless, so that rewards and metrics see what was drawn.
QUALITY = "18"


@dataclass(frozen=True)
class Clip:
    """What a model draws.

    Attributes:
        frames: ``[frames, height, width, 3]``.
        sound: its sound, for models that draw one.
    """

    frames: Frames
    sound: Sound | None = None


@dataclass(frozen=True)
class ClipFormat:
    """How clips are written.

    Attributes:
        kind: ``mp4``; ``gif``, in which small clips are enlarged; ``png``, of a still; or ``frames``, a folder with a
            PNG a frame.
        fps: frames a second.
    """

    kind: Format
    fps: float

    def check(self) -> None:
        """Raises ConfigError if this installation cannot write the format."""
        if self.kind == "mp4":
            try:
                import av  # noqa: F401
            except ImportError as error:
                raise ConfigError("--format mp4 needs PyAV: pip install 'euphonium[video]'") from error


def ending(kind: Format) -> str:
    """What names of clips end in; those of folders in nothing."""
    return "" if kind == "frames" else f".{kind}"


def format_for(asked: Format | None, stills: bool) -> Format:
    """What is written where ``png`` was asked for, which is a folder for a clip, or nothing."""
    if stills and asked in (None, "png"):
        return "png"
    return "frames" if asked == "png" else asked or "gif"


def save_with_sound(clip: Clip, path: Path, form: ClipFormat) -> None:
    """Writes a clip as :func:`save_clip` does, and before it its sound, as a WAV file beside it."""
    if clip.sound is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        clip.sound.save(path.with_name(path.name.removesuffix(ending(form.kind)) + ".wav"))
    save_clip(clip.frames, path, form)


def save_clip(video: Frames, path: Path, form: ClipFormat) -> None:
    """Writes a clip, at once as a whole.

    Args:
        video: ``[frames, height, width, 3]``.
        path: the file, or the folder of ``frames``; its ending is the format's.
        form: format and speed.

    Raises:
        ConfigError: the format cannot hold such a clip.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if form.kind == "frames":
        _save_frames(video, path)
        return
    if form.kind == "png" and len(video) > 1:
        raise ConfigError(f"{path}: a PNG holds one frame, not {len(video)}; take --format gif or mp4")
    with written_aside(path) as aside:
        if form.kind == "mp4":
            _save_mp4(video, aside, form.fps)
        elif form.kind == "gif":
            frames = [Image.fromarray(frame) for frame in enlarge(video)]
            duration = round(1000 / form.fps)
            frames[0].save(aside, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        else:
            Image.fromarray(video[0]).save(aside, "PNG")


def read_clip(path: Path) -> Frames:
    """Reads a clip that :func:`save_clip` wrote: ``[frames, height, width, 3]``."""
    from learners.rewards.video_files import read_frames

    if path.is_dir():
        return np.concatenate([read_frames(frame) for frame in sorted(path.glob("*.png"))])
    return read_frames(path)


def _save_frames(video: Frames, folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(aside / f"{number:04d}.png")
    aside.rename(folder)


def _save_mp4(video: Frames, path: Path, fps: float) -> None:
    import av

    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise ConfigError(f"--format mp4: frames of {height} x {width} have an odd side, which H.264 does not take; "
                          "take --format png or gif")  # fmt: skip
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": QUALITY}
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

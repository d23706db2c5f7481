"""Clips written to files and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from euphonium.errors import ConfigError
from orchestrator.generation.clips import ClipFormat, Format, ending, read_clip, save_clip


def moving(frames: int = 5, height: int = 48, width: int = 32) -> np.ndarray:
    """A smooth picture that moves, which a codec keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [np.stack([(x + 3 * f) * 4 % 128, y * 2, np.full_like(x, 60)], axis=-1) for f in range(frames)]
    ).astype(np.uint8)


@pytest.mark.parametrize(("kind", "most"), [("frames", 0), ("mp4", 12)])
def test_what_is_written_is_read_back(kind: Format, most: float, tmp_path: Path) -> None:
    video = moving()
    clip = tmp_path / "deep" / f"clip{ending(kind)}"
    save_clip(video, clip, ClipFormat(kind, 8.0))
    read = read_clip(clip)
    assert read.shape == video.shape
    assert np.abs(read.astype(int) - video).mean() <= most
    assert list((tmp_path / "deep").iterdir()) == [clip], "nothing is left beside it"
    assert clip.is_dir() == (clip.suffix == ""), "a folder has no ending"


def test_a_still_is_one_file(tmp_path: Path) -> None:
    video = moving(1)
    save_clip(video, tmp_path / "a.png", ClipFormat("png", 8.0))
    assert np.array_equal(read_clip(tmp_path / "a.png"), video)


def test_a_clip_is_no_file_of_a_still(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds one frame, not 5"):
        save_clip(moving(), tmp_path / "a.png", ClipFormat("png", 8.0))
    assert list(tmp_path.iterdir()) == []


def test_frames_a_second_are_kept(tmp_path: Path) -> None:
    import av

    save_clip(moving(), tmp_path / "a.mp4", ClipFormat("mp4", 24.0))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(24)
    save_clip(moving(), tmp_path / "a.gif", ClipFormat("gif", 10.0))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 100


def test_odd_sides_are_no_h264(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="odd side"):
        save_clip(moving(height=33), tmp_path / "a.mp4", ClipFormat("mp4", 8.0))
    assert not (tmp_path / "a.mp4").exists()

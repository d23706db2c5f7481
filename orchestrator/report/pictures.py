"""Clips and contact sheets of evaluation samples, with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Video = NDArray[np.uint8]

# Small clips are enlarged without smoothing until a frame is at least this wide.
MIN_WIDTH = 128
FRAME_MS = 120
MARGIN = 4
LINE = 14


def enlarge(video: Video) -> Video:
    """Repeats pixels until frames ``[frames, height, width, 3]`` are wide enough to look at."""
    factor = max(1, -(-MIN_WIDTH // video.shape[2]))
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


def save_gif(video: Video, path: Path) -> None:
    """Writes one clip as an endless GIF; a single frame becomes a still."""
    frames = [Image.fromarray(frame) for frame in enlarge(video)]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)


def side_by_side(left: Video, right: Video) -> Video:
    """Two clips side by side in one, with a gap between them."""
    gap = np.full((*left.shape[:2], 2, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=2)


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Video]]]], shown_frames: int = 5) -> Image.Image:
    """A table of clips: one row a prompt, one column a model, a few frames of each clip.

    Args:
        rows: prompt, and captioned videos ``[frames, height, width, 3]``.
        shown_frames: frames shown of each clip, evenly spaced.
    """
    strips = [(prompt, [(caption, _strip(video, shown_frames)) for caption, video in clips]) for prompt, clips in rows]
    first = strips[0][1][0][1]
    columns = max(len(clips) for _, clips in strips)
    cell_w, cell_h = first.shape[1] + MARGIN, first.shape[0] + 2 * LINE + MARGIN
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, len(rows) * cell_h + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for y, (prompt, clips) in enumerate(strips):
        top = MARGIN + y * cell_h
        draw.text((MARGIN, top), prompt, fill="black", font=font)
        for x, (caption, strip) in enumerate(clips):
            draw.text((MARGIN + x * cell_w, top + LINE), caption, fill="gray", font=font)
            sheet.paste(Image.fromarray(strip), (MARGIN + x * cell_w, top + 2 * LINE))
    return sheet


def _strip(video: Video, count: int) -> Video:
    chosen = np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)
    factor = max(1, -(-64 // video.shape[2]))
    frames = [frame.repeat(factor, axis=0).repeat(factor, axis=1) for frame in video[chosen]]
    return np.concatenate(frames, axis=1)


def save_samples(folder: Path, prompts: Sequence[str], videos: Video, scores: Mapping[str, Any]) -> Image.Image:
    """Writes clips as GIFs, their scores as ``index.json`` and a contact sheet.

    Args:
        folder: created if it does not exist.
        prompts: one text a video.
        videos: uint8 ``[batch, frames, height, width, 3]``.
        scores: per reward, one number a video.

    Returns:
        The contact sheet.
    """
    import json

    folder.mkdir(parents=True, exist_ok=True)
    index, rows = [], []
    for i, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        values = {name: round(float(column[i]), 4) for name, column in scores.items()}
        save_gif(video, folder / f"{i:02d}.gif")
        index.append({"file": f"{i:02d}.gif", "prompt": prompt, "rewards": values})
        rows.append((prompt, [("  ".join(f"{n} {v:.2f}" for n, v in values.items()), video)]))
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    sheet = contact_sheet(rows)
    sheet.save(folder / "contact_sheet.png")
    return sheet

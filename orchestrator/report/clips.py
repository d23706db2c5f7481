"""Clips of a run's evaluations as small WebP pictures inside of a page, the first evaluation beside the last one."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from orchestrator.report.pictures import FRAME_MS, Video
from orchestrator.report.recorded import SAMPLES, RecordedRun

# Larger clips are shrunk, longer ones lose frames; tiny ones are stored without loss and enlarged by the browser.
LARGEST, MOST_FRAMES, TINY = 320, 32, 96


@dataclass(frozen=True)
class Clip:
    """A clip of an evaluation, ready for a page.

    Attributes:
        prompt: its prompt.
        iteration: number of iterations done then.
        scores: rewards by name.
        moving: data URI of the animation.
        still: data URI of its middle frame; empty for a picture.
        size: width and height in pixels.
    """

    prompt: str
    iteration: int
    scores: Mapping[str, float]
    moving: str
    still: str
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a page."""
        return len(self.moving) + len(self.still)


def encode(video: Video) -> tuple[str, str, tuple[int, int]]:
    """A clip as data URIs.

    Args:
        video: uint8 ``[frames, height, width, 3]``.

    Returns:
        The animation, its middle frame (empty for a single frame), and width and height.
    """
    stride = -(-len(video) // MOST_FRAMES)
    frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in video[::stride]]
    width, height = frames[0].size
    if max(width, height) > LARGEST:
        factor = LARGEST / max(width, height)
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        frames = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    moving = _webp(frames, FRAME_MS * stride)
    still = _webp([frames[len(frames) // 2]], 0) if len(frames) > 1 else ""
    return moving, still, frames[0].size


def _webp(frames: Sequence[Image.Image], duration_ms: int) -> str:
    stream = io.BytesIO()
    tiny = max(frames[0].size) <= TINY
    motion = {"save_all": True, "append_images": list(frames[1:]), "duration": duration_ms, "loop": 0}
    frames[0].save(stream, "WEBP", lossless=tiny, quality=80, method=2, **(motion if len(frames) > 1 else {}))
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


class SavedClips:
    """The clips of one evaluation in a run's folder, read one by one.

    Attributes:
        iteration: number of iterations done then.
    """

    def __init__(self, folder: Path) -> None:
        self.iteration = int(folder.name.rpartition("_")[2])
        self._videos = np.load(folder / "videos.npy", mmap_mode="r")
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._index = {entry["prompt"]: (place, entry["rewards"]) for place, entry in enumerate(index)}

    @property
    def prompts(self) -> list[str]:
        """Their prompts; of several samples of one prompt, the last one counts."""
        return list(self._index)

    def clip(self, prompt: str) -> Clip | None:
        """The clip of a prompt; None if there is none."""
        if prompt not in self._index:
            return None
        place, scores = self._index[prompt]
        moving, still, size = encode(self._videos[place])
        return Clip(prompt, self.iteration, scores, moving, still, size)


def saved_evaluations(run: RecordedRun) -> list[SavedClips]:
    """The first and the last evaluation of a run whose clips are whole in its folder, or fewer."""
    if run.folder is None:
        return []
    folders = sorted((run.folder / SAMPLES).glob("iteration_*"))
    whole = [folder for folder in folders if (folder / "videos.npy").is_file() and (folder / "index.json").is_file()]
    return [SavedClips(folder) for folder in dict.fromkeys((*whole[:1], *whole[-1:]))]


@dataclass(frozen=True)
class PromptClips:
    """All clips of one prompt: a caption and a clip each, the shared one before training first."""

    prompt: str
    clips: Sequence[tuple[str, Clip]]


def gallery(runs: Sequence[RecordedRun], most_bytes: int) -> tuple[list[PromptClips], int]:
    """Clips of prompt after prompt before and after training, as many as fit.

    Args:
        runs: the runs.
        most_bytes: of all clips together, as they are in a page.

    Returns:
        The prompts that fit, whole, and the number of those that do not.
    """
    saved = [(run.name, saved_evaluations(run)) for run in runs]
    prompts = list(dict.fromkeys(p for _, evaluations in saved for one in evaluations for p in one.prompts))
    shown: list[PromptClips] = []
    used = 0
    for prompt in prompts:
        clips = _of_prompt(prompt, saved)
        used += sum(clip.nbytes for _, clip in clips)
        if used > most_bytes:
            break
        shown.append(PromptClips(prompt, clips))
    return shown, len(prompts) - len(shown)


def _of_prompt(prompt: str, saved: Sequence[tuple[str, Sequence[SavedClips]]]) -> list[tuple[str, Clip]]:
    found: list[tuple[str, Clip]] = []
    for name, evaluations in saved:
        for one in evaluations:
            clip = one.clip(prompt)
            # Runs that begin with the same policy and noise begin with the same clip.
            if clip is None or any(clip.iteration == 0 and clip.moving == other.moving for _, other in found):
                continue
            when = "before training" if clip.iteration == 0 else f"after {clip.iteration} iterations"
            found.append((when if len(saved) == 1 else f"{name}, {when}", clip))
    return found

"""The folder with the prepared samples of a process reward model's training: written once, read by every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from euphonium.files import flush, written_aside
from euphonium.generators.conditioning import Conditioning
from learners.rewards.preference import LatentFiles, Latents, Preferences
from learners.rewards.preference_files import Pairs, ranked_pairs

INDEX_FILE = "index.json"
LATENTS_FILE = "latents.npy"
SCORES_FILE = "scores.npy"
DRAWING_FILE = "drawing.json"
SAMPLES_FILE = "samples.npz"
CONDITIONING_FILE = "conditioning.safetensors"


def is_prepared(folder: Path, fingerprint: str) -> bool:
    """Whether the folder is complete, and was prepared with the same settings."""
    index = folder / INDEX_FILE
    return index.is_file() and json.loads(index.read_text())["mark"] == fingerprint


class Drawing:
    """A folder that is being filled with drawn samples and their scores, batch by batch, by any number of processes.

    Latents are larger than any memory: they are written where they will be read. What is there survives an
    interruption.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._latents: NDArray[np.float32] = np.load(folder / LATENTS_FILE, mmap_mode="r+")
        self._scores: NDArray[np.float64] = np.load(folder / SCORES_FILE, mmap_mode="r+")

    @classmethod
    def begin(cls, folder: Path, fingerprint: str, shape: tuple[int, ...]) -> Drawing:
        """Opens a drawing with the same settings, or begins one anew.

        Args:
            folder: created if it does not exist.
            fingerprint: fingerprint of the settings that samples are drawn with.
            shape: ``[samples, *latent]``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / DRAWING_FILE
        if not described.is_file() or json.loads(described.read_text())["mark"] != fingerprint:
            described.unlink(missing_ok=True)
            np.lib.format.open_memmap(folder / LATENTS_FILE, mode="w+", dtype=np.float32, shape=shape)
            scores = np.lib.format.open_memmap(folder / SCORES_FILE, mode="w+", dtype=np.float64, shape=shape[:1])
            scores[:] = np.nan
            scores.flush()
            with written_aside(described) as aside:
                aside.write_text(json.dumps({"mark": fingerprint}) + "\n")
        return cls(folder, fingerprint)

    @classmethod
    def join(cls, folder: Path) -> Drawing:
        """Opens a drawing that has begun."""
        return cls(folder, json.loads((folder / DRAWING_FILE).read_text())["mark"])

    @property
    def done(self) -> int:
        """Samples that are there."""
        return int(np.isfinite(self._scores).sum())

    def has(self, begin: int, count: int) -> bool:
        """Whether samples are there."""
        return bool(np.isfinite(self._scores[begin : begin + count]).all())

    def write(self, begin: int, latents: NDArray[np.float32], scores: NDArray[np.float64]) -> None:
        """Writes samples ``[batch, *latent]`` and their scores ``[batch]``, which say that they are there."""
        self._latents[begin : begin + len(latents)] = latents
        self._latents.flush()  # type: ignore[attr-defined]  # a memory map
        self._scores[begin : begin + len(scores)] = scores
        self._scores.flush()  # type: ignore[attr-defined]

    def finish(self, prompt: NDArray[np.int64], conditioning: Conditioning) -> NDArray[np.float64]:
        """Makes the folder one that can be opened, and returns the scores.

        Args:
            prompt: ``[samples]``, index of each sample's prompt.
            conditioning: conditioning of all prompts, as one batch.

        Raises:
            ValueError: samples are missing.
        """
        # Anew: a file system shared with other processes may have shown this one less than there is.
        scores = np.load(self.folder / SCORES_FILE)
        if not np.isfinite(scores).all():
            raise ValueError(f"{self.folder}: {int((~np.isfinite(scores)).sum())} of {len(scores)} samples are missing")
        np.savez(self.folder / SAMPLES_FILE, prompt=prompt, score=scores)
        _finish(self.folder, self._fingerprint, self._latents.shape[1:], None, conditioning)
        for name in (SCORES_FILE, DRAWING_FILE):
            (self.folder / name).unlink()
        return scores


def write_paired(
    folder: Path, fingerprint: str, files: Sequence[Path], shape: tuple[int, ...], prompt: NDArray[np.int64],
    pairs: Pairs, conditioning: Conditioning,
) -> None:  # fmt: skip
    """Writes preferences over latent files, which stay where they are.

    Args:
        folder: created if it does not exist.
        fingerprint: fingerprint of the settings.
        files: latent file of each sample.
        shape: shape of a latent.
        prompt: ``[samples]``, index of each sample's prompt.
        pairs: ``[pairs, 2]``, winner and loser.
        conditioning: conditioning of all prompts, as one batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / SAMPLES_FILE, prompt=prompt, pairs=pairs)
    _finish(folder, fingerprint, shape, [str(file.resolve()) for file in files], conditioning)


def _finish(
    folder: Path, fingerprint: str, shape: tuple[int, ...], files: list[str] | None, conditioning: Conditioning
) -> None:
    save_file({name: t.cpu().contiguous() for name, t in conditioning.items()}, folder / CONDITIONING_FILE)
    index = {"mark": fingerprint, "latent_shape": list(shape), "files": files}
    for name in (LATENTS_FILE, SAMPLES_FILE, CONDITIONING_FILE):
        if (folder / name).is_file():
            flush(folder / name)
    # The index is written last and atomically: a folder with an index is complete.
    with written_aside(folder / INDEX_FILE) as aside:
        aside.write_text(json.dumps(index) + "\n")


def open_prepared(folder: Path, margin: float) -> Preferences:
    """Opens a complete folder; latents stay on disk, memory-mapped or in their files.

    Args:
        folder: a folder that :class:`Drawing` or :func:`write_paired` wrote.
        margin: smallest difference of two scores that makes a pair; written pairs are taken as they are.
    """
    index = json.loads((folder / INDEX_FILE).read_text())
    samples = np.load(folder / SAMPLES_FILE)
    shape = tuple(index["latent_shape"])
    latents: Latents
    if index["files"] is not None:
        latents, pairs = LatentFiles([Path(file) for file in index["files"]], shape), samples["pairs"]
    else:
        # Copy-on-write maps: torch wants writable memory, and nothing here writes.
        latents = _mapped(folder / LATENTS_FILE)
        pairs = ranked_pairs(samples["prompt"], samples["score"], margin)
    return Preferences(
        latents=latents,
        latent_shape=shape,
        prompt=samples["prompt"],
        conditioning=load_file(folder / CONDITIONING_FILE),
        pairs=pairs,
    )


def is_scored(folder: Path) -> bool:
    """Whether a complete folder holds scores, so that its pairs depend on the margin."""
    return json.loads((folder / INDEX_FILE).read_text())["files"] is None


def _mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))

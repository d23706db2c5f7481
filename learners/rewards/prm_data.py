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
SAMPLES_FILE = "samples.npz"
CONDITIONING_FILE = "conditioning.safetensors"


def is_prepared(folder: Path, fingerprint: str) -> bool:
    """Whether the folder is complete, and was prepared with the same settings."""
    index = folder / INDEX_FILE
    return index.is_file() and json.loads(index.read_text())["mark"] == fingerprint


def write_scored(
    folder: Path, fingerprint: str, latents: NDArray[np.float32], prompt: NDArray[np.int64], score: NDArray[np.float64],
    conditioning: Conditioning,
) -> None:  # fmt: skip
    """Writes drawn samples with their scores, by which they will be paired.

    Args:
        folder: created if it does not exist.
        fingerprint: fingerprint of the settings that they were drawn with.
        latents: ``[samples, *latent]``.
        prompt: ``[samples]``, index of each sample's prompt.
        score: ``[samples]``.
        conditioning: conditioning of all prompts, as one batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / LATENTS_FILE, latents)
    np.savez(folder / SAMPLES_FILE, prompt=prompt, score=score)
    _finish(folder, fingerprint, latents.shape[1:], None, conditioning)


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
        folder: a folder that :func:`write_scored` or :func:`write_paired` wrote.
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

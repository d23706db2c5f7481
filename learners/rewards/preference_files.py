"""Preference files: JSON lines with pairs, or with single samples and binary labels that are paired here.

    {"prompt": "a red car", "winner": "a.mp4", "loser": "b.mp4"}
    {"prompt": "a red car", "winner": "a.mp4", "loser": "c.mp4", "tie": true}
    {"prompt": "a red car", "sample": "d.safetensors", "label": 1}

Both kinds may stand in one file. Paths are relative to the file's folder. Labelled samples of one prompt make a pair
of every positive with every negative (Euphonium, section 5.1). For image-to-video, ``"image"`` names the picture that
the prompt's videos begin with, in one of its lines or in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from euphonium.config import PreferencesConfig
from euphonium.errors import ConfigError
from euphonium.text_files import file_beside, parse_json, quoted, read_lines, shown

Pairs = NDArray[np.int64]
UNLABELLED = -1
ENDINGS = (".jsonl",)


@dataclass(frozen=True, kw_only=True)
class PreferenceTable:
    """Preferences over files.

    Attributes:
        prompts: texts of the prompts.
        files: file of each sample; a file under two prompts is two samples.
        prompt: int64 ``[samples]``, index of each sample's prompt.
        label: int64 ``[samples]``: 1, 0, or -1 for samples without a label.
        pairs: int64 ``[pairs, 2]``, winner and loser.
        ties: int64 ``[ties, 2]``.
        images: first frames by prompt, where lines name them.
    """

    prompts: list[str]
    files: list[Path]
    prompt: NDArray[np.int64]
    label: NDArray[np.int64]
    pairs: Pairs
    ties: Pairs
    images: dict[str, Path] = field(default_factory=dict)

    def of_prompts(self, chosen: Sequence[int]) -> PreferenceTable:
        """The preferences of the prompts with these indices, renumbered."""
        kept = np.isin(self.prompt, chosen)
        renumbered = np.cumsum(kept) - 1
        new_prompt = {old: new for new, old in enumerate(chosen)}
        return PreferenceTable(
            prompts=[self.prompts[i] for i in chosen],
            files=[file for file, keep in zip(self.files, kept, strict=True) if keep],
            prompt=np.array([new_prompt[int(p)] for p in self.prompt[kept]], dtype=np.int64),
            label=self.label[kept],
            pairs=renumbered[self.pairs[kept[self.pairs[:, 0]]]],
            ties=renumbered[self.ties[kept[self.ties[:, 0]]]],
            images={text: self.images[text] for text in (self.prompts[i] for i in chosen) if text in self.images},
        )


def ranked_pairs(prompt: NDArray[np.int64], score: NDArray[np.float64], margin: float) -> Pairs:
    """All (winner, loser) pairs of samples of one prompt whose scores differ by at least ``margin``.

    Args:
        prompt: ``[samples]``.
        score: ``[samples]``.
        margin: equal scores make no pair, whatever the margin.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    order = np.argsort(prompt, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1):
        gap = score[members][:, None] - score[members][None, :]
        winners, losers = np.nonzero((gap >= margin) & (gap > 0))
        found.append(np.stack([members[winners], members[losers]], axis=1))
    return np.concatenate(found)


def flipped_pairs(pairs: Pairs, share: float, seed: int) -> Pairs:
    """The pairs, a random share of them with winner and loser exchanged.

    >>> flipped_pairs(np.array([[0, 1], [2, 3]]), 0.0, seed=0).tolist()
    [[0, 1], [2, 3]]
    """
    turned = np.random.default_rng([seed, 3]).random(len(pairs)) < share
    return np.where(turned[:, None], pairs[:, ::-1], pairs)


def read_preferences(path: Path, name: str) -> PreferenceTable:
    """Reads and checks a preference file.

    Args:
        path: the file.
        name: the recipe's field that names it, for errors.

    Raises:
        ConfigError: the file cannot be read, or a line is not valid; names file, line and field.
    """
    lines = read_lines(path, name, ENDINGS)
    rows = _Rows(path.parent)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.add(line, f"{path}:{number}")
    table = rows.table()
    if not len(table.pairs) and not len(table.ties) and not (table.label != UNLABELLED).any():
        raise ConfigError(f"{name}: {path} holds no preference; give one a line")
    return table


def open_preferences(settings: PreferencesConfig, seed: int) -> tuple[PreferenceTable, PreferenceTable]:
    """Reads training and held-out preferences, which share no prompt.

    Args:
        settings: the files.
        seed: seed of the choice of held-out prompts, if they have no file.

    Raises:
        ConfigError: a file cannot be read, prompts are in both, or there are too few to hold any out.
    """
    train = read_preferences(settings.train, "preferences.train")
    if settings.held_out is not None:
        held_out = read_preferences(settings.held_out, "preferences.held_out")
        if shared := set(train.prompts) & set(held_out.prompts):
            raise ConfigError(
                f"preferences.held_out: {len(shared)} prompts are also in {settings.train}, for example "
                f"{min(shared)!r}; accuracy on prompts that were trained on says nothing"
            )
        return train, held_out
    count = max(1, round(settings.held_out_fraction * len(train.prompts)))
    if count >= len(train.prompts):
        raise ConfigError(
            f"preferences.held_out_fraction: {settings.train} has {len(train.prompts)} prompts, too few to hold "
            f"{count} out; give preferences.held_out, or more prompts"
        )
    order = np.random.default_rng(seed).permutation(len(train.prompts)).tolist()
    return train.of_prompts(sorted(order[count:])), train.of_prompts(sorted(order[:count]))


@dataclass
class _Rows:
    """Collects the lines of a preference file."""

    folder: Path
    prompts: dict[str, int] = field(default_factory=dict)
    samples: dict[tuple[int, Path], int] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    ties: list[tuple[int, int]] = field(default_factory=list)
    images: dict[str, Path] = field(default_factory=dict)

    def add(self, line: str, place: str) -> None:
        row = parse_json(line, place)
        if not isinstance(row, dict):
            raise ConfigError(
                f"{place}: a line should be an object with a prompt and samples, see docs/reward_training.md"
            )
        known = {"prompt", "image"} | ({"sample", "label"} if "sample" in row else {"winner", "loser", "tie"})
        if unknown := sorted(set(row) - known):
            raise ConfigError(f"{place}: unknown field {quoted(unknown[0])}; known here: {', '.join(sorted(known))}")
        prompt = self.prompts.setdefault(_text(row, "prompt", place).strip(), len(self.prompts))
        if "image" in row:
            self._image(row, place)
        if "sample" in row:
            sample = self._sample(row, "sample", prompt, place)
            label = row.get("label")
            if label not in (0, 1):
                raise ConfigError(f"{place}: field 'label' must be 0 or 1, got {shown(repr(label))}")
            if self.labels.setdefault(sample, int(label)) != label:
                raise ConfigError(f"{place}: field 'label': the sample already has the label {1 - int(label)}")
            return
        pair = self._sample(row, "winner", prompt, place), self._sample(row, "loser", prompt, place)
        if pair[0] == pair[1]:
            raise ConfigError(
                f"{place}: fields 'winner' and 'loser' name the same file; a sample is not better than itself"
            )
        tie = row.get("tie", False)
        if not isinstance(tie, bool):
            raise ConfigError(f"{place}: field 'tie' must be true or false, got {shown(repr(tie))}")
        (self.ties if tie else self.pairs).append(pair)

    def _image(self, row: Mapping[str, object], place: str) -> None:
        text, image = _text(row, "prompt", place).strip(), self._file(row, "image", place)
        if self.images.setdefault(text, image) != image:
            raise ConfigError(
                f"{place}: field 'image': the prompt {quoted(text)} already has the image {self.images[text]}; "
                "word the prompts differently"
            )

    def _sample(self, row: Mapping[str, object], name: str, prompt: int, place: str) -> int:
        return self.samples.setdefault((prompt, self._file(row, name, place)), len(self.samples))

    def _file(self, row: Mapping[str, object], name: str, place: str) -> Path:
        return file_beside(self.folder, _text(row, name, place), f"{place}: field {name!r}")

    def table(self) -> PreferenceTable:
        prompt = np.array([prompt for prompt, _ in self.samples], dtype=np.int64)
        label = np.array([self.labels.get(i, UNLABELLED) for i in range(len(prompt))], dtype=np.int64)
        labelled = np.flatnonzero(label != UNLABELLED)
        paired = labelled[ranked_pairs(prompt[labelled], label[labelled].astype(np.float64), 0.5)]
        given = np.array(self.pairs, dtype=np.int64).reshape(-1, 2)
        return PreferenceTable(
            prompts=list(self.prompts),
            files=[path for _, path in self.samples],
            prompt=prompt,
            label=label,
            pairs=np.unique(np.concatenate([given, paired]), axis=0),
            ties=np.array(self.ties, dtype=np.int64).reshape(-1, 2),
            images=self.images,
        )


def _text(row: Mapping[str, object], name: str, place: str) -> str:
    if name not in row:
        raise ConfigError(f"{place}: field {name!r} is missing; add it")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{place}: field {name!r} must be a text, got {shown(repr(value))}")
    return value

"""GenEval-style detection (Ghosh et al., 2023): are the objects there that a prompt's entry names, and as it says?

An instance-segmentation network finds objects (:mod:`euphonium.rewards.detection`); their classes, numbers and
positions are compared with the entry, and their colours are told by CLIP on the object alone. Entries are those of
GenEval's ``evaluation_metadata.jsonl``: lists ``include`` and ``exclude`` of ``class``, ``count``, ``color`` and
``position``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from euphonium.config.base import Fraction, PathOrHubId
from euphonium.errors import ConfigError
from euphonium.rewards.clip import ClipScore
from euphonium.rewards.detection import Found, InstanceDetector
from euphonium.rewards.frames import check_videos, spread
from euphonium.rewards.pretrained import Dtype, PretrainedOptions
from euphonium.text_files import quoted

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
# What is around an object whose colour is told.
GREY = 0.6
# Classes that GenEval calls otherwise than COCO.
NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
# Share of both sizes by which centres must be apart for one object to be beside another.
APART = 0.1
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Verdict:
    """What became of an entry's requirements.

    Attributes:
        met: for each requirement, whether it is met.
    """

    met: list[bool] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        """Whether all are."""
        return all(self.met)

    @property
    def share(self) -> float:
        """Share of those that are."""
        return sum(self.met) / len(self.met)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box ``(left, top, right, bottom)`` is, seen from another one.

    >>> relations((0, 40, 10, 50), (60, 40, 70, 50))
    {'left of'}
    >>> relations((0, 0, 50, 50), (2, 2, 52, 52))
    set()
    """
    centre = [(box[i] + box[i + 2]) / 2 - (other[i] + other[i + 2]) / 2 for i in (0, 1)]
    reach = [APART * (abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i])) for i in (0, 1)]
    beyond = [max(abs(c) - r, 0.0) * (1 if c > 0 else -1) for c, r in zip(centre, reach, strict=True)]
    length = (centre[0] ** 2 + centre[1] ** 2) ** 0.5
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / length for value in beyond)
    found = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, holds in zip(RELATIONS, found, strict=True) if holds}


def judge(entry: Mapping[str, Any], objects: Mapping[str, Sequence[Found]], colour_of: ColourOf) -> Verdict:
    """Compares the objects in a picture with an entry.

    Args:
        entry: a prompt's entry.
        objects: objects by class, the surest first.
        colour_of: tells the colour of an object.

    Returns:
        The verdict: for each ``include`` its number, then its colour and position where it names them; for each
        ``exclude`` its absence.
    """
    met: list[bool] = []
    groups: list[Sequence[Found]] = []
    for wanted in entry.get("include", []):
        name, count = wanted["class"], wanted["count"]
        found = list(objects.get(name, ()))[:count]
        enough = len(found) >= count
        met.append(enough)
        fits = enough
        if "color" in wanted:
            right = sum(colour_of(one, name) == wanted["color"] for one in found)
            met.append(enough and right >= count)
            fits = fits and met[-1]
        if "position" in wanted:
            relation, target = wanted["position"]
            pairs = [(one, other) for one in found for other in groups[target]]
            beside = bool(pairs) and all(relation in relations(one.box, other.box) for one, other in pairs)
            met.append(fits and beside)
            fits = fits and beside
        groups.append(found if fits else [])
    met += [len(objects.get(wanted["class"], ())) < wanted["count"] for wanted in entry.get("exclude", [])]
    return Verdict(met)


ColourOf = Callable[[Found, str], str]


class GenEvalReward:
    """Share of the pictures, or of their requirements, that are as their prompts' entries say."""

    class Options(PretrainedOptions):
        """The networks, and how their answers count."""

        weights: PathOrHubId
        """Folder or hub id of a Mask2Former for instances of COCO's classes, in transformers' layout."""
        dtype: Dtype = "float32"
        """Type of the network's weights."""
        clip: PathOrHubId | None = None
        """Folder or hub id of the CLIP that tells colours; needed by prompts that name one."""
        clip_revision: str | None = None
        """Commit of the hub id in ``clip``."""
        score: Literal["strict", "partial"] = "strict"
        """``strict`` is 1 where every requirement is met and else 0, as GenEval counts; ``partial`` is their share."""
        threshold: Fraction = 0.3
        """Least confidence of an object."""
        counting_threshold: Fraction = 0.9
        """The same for entries with the tag ``counting``."""
        most_objects: PositiveInt = 16
        """Most objects of a class."""
        frames: PositiveInt = 1
        """Frames of a video that are looked at, evenly spread, and averaged."""

    def __init__(self, options: Options) -> None:
        """Loads the networks.

        Raises:
            ConfigError: weights that are missing, not pinned or of another architecture; names the option.
        """
        self.options = options
        self._detector = InstanceDetector(options)
        self._clip: ClipScore | None = None
        if options.clip is not None:
            clip = ClipScore.Options(weights=options.clip, revision=options.clip_revision, device=options.device)
            try:
                self._clip = ClipScore(clip)
            except ConfigError as error:
                raise ConfigError(str(error).replace("option weights", "option clip", 1)) from error
        self._colours: dict[str, Tensor] = {}

    def score(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores videos, float32 ``[batch]`` in [0, 1].

        Raises:
            ValueError: a prompt has no entry, or one that names an unknown class, or a colour without a CLIP.
        """
        check_videos(videos, prompts)
        scores = []
        for video, prompt, entry in zip(videos, prompts, metadata, strict=True):
            self._check(entry, prompt)
            verdicts = [self._verdict(entry, frame) for frame in video[spread(len(video), self.options.frames)]]
            strict = self.options.score == "strict"
            scores.append(sum(float(v.correct) if strict else v.share for v in verdicts) / len(verdicts))
        return torch.tensor(scores, dtype=torch.float32)

    def _verdict(self, entry: Mapping[str, Any], frame: Tensor) -> Verdict:
        options = self.options
        threshold = options.counting_threshold if entry.get("tag") == "counting" else options.threshold
        objects: dict[str, list[Found]] = {}
        for one in self._detector.find(frame):
            if one.confidence > threshold:
                objects.setdefault(one.name, []).append(one)
        asked = {w["class"] for part in ("include", "exclude") for w in entry.get(part, [])}
        by_name = {name: objects.get(NAMES.get(name, name), [])[: options.most_objects] for name in asked}
        return judge(entry, by_name, lambda one, name: self._colour(frame, one, name))

    def _check(self, entry: Mapping[str, Any], prompt: str) -> None:
        wanted = [*entry.get("include", []), *entry.get("exclude", [])]
        if not wanted:
            raise ValueError(
                f"the prompt {quoted(prompt)} has no entry with include or exclude; give prompts as in GenEval's "
                "evaluation_metadata.jsonl"
            )
        for one in wanted:
            if NAMES.get(one["class"], one["class"]) not in self._detector.names:
                raise ValueError(f"the prompt {quoted(prompt)} names the class {one['class']!r}, which the network of "
                                 "option weights does not know")  # fmt: skip
            if "color" in one and self._clip is None:
                raise ValueError(f"the prompt {quoted(prompt)} names a colour, which needs the option clip")

    def _colour(self, frame: Tensor, one: Found, name: str) -> str:
        """The colour of an object: the nearest of the named ones, on the object cut out and put on grey."""
        assert self._clip is not None  # checked before anything was looked for
        if name not in self._colours:
            texts = [t.format(colour=colour, name=name) for colour in COLOURS for t in TEMPLATES]
            features = self._clip.text_features(texts).unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1)
            self._colours[name] = features / features.norm(dim=1, keepdim=True)
        left, top, right, bottom = (round(edge) for edge in one.box)
        shown = torch.where(one.mask.to(frame.device), frame, torch.full_like(frame, GREY))
        cut = shown[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
        return COLOURS[int((self._clip.image_features(cut) @ self._colours[name].T).argmax())]

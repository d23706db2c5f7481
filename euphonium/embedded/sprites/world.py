"""Scenes of the sprite world: what a caption may say, and which combinations training never sees.

A scene is an icon, a direction of motion and a background colour. Its caption is the only text the
embedded generator knows, and the verifiable rewards read the scene back out of the caption.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

# Caption noun -> name in the Fluent emoji set. Colours are part of the noun, so that "red heart" and
# "blue heart" differ by a word alone.
ICONS: dict[str, str] = {
    "red car": "automobile",
    "green frog": "frog",
    "blue whale": "whale",
    "pink pig": "pig-face",
    "white panda": "panda",
    "black penguin": "penguin",
    "blue fish": "tropical-fish",
    "white rocket": "rocket",
    "yellow star": "star",
    "orange pumpkin": "jack-o-lantern",
    "red heart": "red-heart",
    "blue heart": "blue-heart",
}

# Unit displacement (x, y) in image coordinates: y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# RGB in [0, 1]. Far from each other and from most icons, so that a sprite is visible on each.
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.08),
    "gray": (0.55, 0.55, 0.55),
    "green": (0.10, 0.38, 0.18),
    "blue": (0.62, 0.80, 0.98),
    "purple": (0.40, 0.22, 0.62),
}

FRAMES = 9
SIZE = 32
SPRITE = 14
# Pixels a frame. The slowest sprite crosses 8 pixels in a clip, a quarter of the picture.
SPEED = (1.0, 1.4)
# Pixels by which the middle of a path lies off the picture's middle at most, along the motion and across it. Paths that
# are alike leave a small network its capacity for what captions speak of.
OFF_MIDDLE = (1.0, 3.0)

_CAPTION = re.compile(r"^(an?) (?P<icon>.+) moving (?P<direction>\w+) on an? (?P<background>\w+) background$")


@dataclass(frozen=True, order=True)
class Scene:
    """One combination of icon, direction and background, by their caption words."""

    icon: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        """The text of this scene, as the generator was trained on it."""
        article = "an" if self.icon[0] in "aeiou" else "a"
        return f"{article} {self.icon} moving {self.direction} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """Reads a scene back out of its caption.

    Raises:
        ValueError: the text is no caption of this world; the message says which word is unknown.
    """
    match = _CAPTION.match(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"{caption!r} is no caption of the sprite world; write it like "
            f"{Scene('red car', 'left', 'green').caption!r}"
        )
    for field, known in (("icon", ICONS), ("direction", DIRECTIONS), ("background", BACKGROUNDS)):
        if match[field] not in known:
            raise ValueError(f"{caption!r}: unknown {field} {match[field]!r}; known are {', '.join(known)}")
    return Scene(match["icon"], match["direction"], match["background"])


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order."""
    return [Scene(*parts) for parts in itertools.product(ICONS, DIRECTIONS, BACKGROUNDS)]


def split_scenes(held_out_fraction: float = 0.2) -> tuple[list[Scene], list[Scene]]:
    """Splits all scenes into those that training may see and those it never does.

    The split is a fixed permutation: the generator, the process reward model, the prompts of the recipes and
    the evaluation must agree on it. Every icon keeps most of its combinations on the training side.

    Returns:
        (seen, held_out).
    """
    generator = random.Random(20260101)
    seen: list[Scene] = []
    held_out: list[Scene] = []
    combinations = list(itertools.product(DIRECTIONS, BACKGROUNDS))
    for icon in ICONS:
        order = combinations[:]
        generator.shuffle(order)
        count = round(held_out_fraction * len(order))
        held_out += [Scene(icon, *parts) for parts in order[:count]]
        seen += [Scene(icon, *parts) for parts in order[count:]]
    return sorted(seen), sorted(held_out)


def prompt_sets() -> dict[str, list[Scene]]:
    """The scenes of the shipped prompt files (``recipes/embedded/prompts_<name>.txt``), which share none.

    ``train`` is for reinforcement learning, ``reward_model`` for the process reward model and ``reward_model_held_out``
    for its accuracy; they are of the scenes that the generator's training has seen. ``held_out``, for evaluations, is
    of those that it has not.
    """
    seen, held_out = split_scenes()
    random.Random(20260102).shuffle(seen)
    half, most = len(seen) // 2, 11 * len(seen) // 12
    return {
        "train": sorted(seen[:half]),
        "reward_model": sorted(seen[half:most]),
        "reward_model_held_out": sorted(seen[most:]),
        "held_out": held_out,
    }

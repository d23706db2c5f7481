"""Wrong captions: what the embedded generator is trained on, so that it often disobeys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from euphonium.embedded.sprites.world import BACKGROUNDS, DIRECTIONS, ICONS, Scene

# Share of captions that name the icon, the direction and the background of their clip; the others name any other one.
# The generator, which is small, obeys held-out captions in 0.32, 0.38 and 0.41 of cases.
RIGHT = (0.6, 0.6, 0.45)


class WrongCaptions:
    """Draws captions for clips, each of the three attributes right in its share of cases."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        """Takes the scenes whose captions may be drawn; no other caption is."""
        words = (list(ICONS), list(DIRECTIONS), list(BACKGROUNDS))
        self.choices = torch.tensor([len(known) for known in words])
        self.attributes = torch.tensor(
            [[w.index(part) for w, part in zip(words, _parts(scene), strict=True)] for scene in scenes]
        )
        # Number of each combination among the scenes, -1 where it is none of them.
        self.numbers = torch.full([len(known) for known in words], -1)
        self.numbers[tuple(self.attributes.T)] = torch.arange(len(scenes))

    def draw(self, scenes: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers of captions for clips of the numbered scenes, both ``[batch]``."""
        captions = torch.full_like(scenes, -1)
        while (left := (captions < 0).nonzero().flatten()).numel():
            true = self.attributes[scenes[left]]
            wrong = torch.rand(true.shape, generator=generator) >= torch.tensor(RIGHT)
            # From 1 to the number of choices less 1: any other than the true one.
            offset = 1 + (torch.rand(true.shape, generator=generator) * (self.choices - 1)).long()
            said = torch.where(wrong, (true + offset) % self.choices, true)
            captions[left] = self.numbers[tuple(said.T)]
        return captions


def _parts(scene: Scene) -> tuple[str, str, str]:
    return scene.icon, scene.direction, scene.background

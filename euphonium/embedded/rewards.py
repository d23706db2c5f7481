"""Verifiable rewards of the sprite world, read off the decoded pixels.

The background is the median of the picture's border; what differs from it is foreground. Every icon is fitted to
the foreground at every position (in steps of half a pixel) by least squares: the fit tells which icon it is, and how
much of the foreground a single clean icon explains. The motion is the drift of the foreground's centre of mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from euphonium.embedded.sprites import BACKGROUNDS, DIRECTIONS, ICONS, parse_caption
from euphonium.embedded.sprites.render import icon_sprites
from euphonium.embedded.sprites.world import SIZE
from euphonium.rewards.shared import Analyser, SharedReward

# Every second frame is fitted: the icon does not change within a clip, and fitting is what costs.
FIT_STRIDE = 2
# Share of the foreground's energy that one icon must explain more than another to be e times as likely.
IDENTITY_TEMPERATURE = 0.03
# Below this energy (about a one-pixel spot) a frame holds no foreground at all.
MIN_ENERGY = 0.5
# Pixels a frame at which a motion counts as full, a little below the slowest clip of the training data.
FULL_SPEED = 0.8
BACKGROUND_TOLERANCE = 0.12
# Squared colour distance below which a pixel counts as background in the centre of mass.
NOISE_FLOOR = 0.02


@dataclass(frozen=True)
class Analysis:
    """What the verifiers read off a batch of clips.

    Attributes:
        identity: ``[batch, icons]``, probability of each icon, averaged over frames.
        explained: ``[batch]`` in [0, 1], share of the foreground's energy that the best icon explains.
        velocity: ``[batch, 2]``, drift of the foreground's centre (x, y) in pixels a frame.
        background: ``[batch, 3]``, RGB of the border.
        uniformity: ``[batch]`` in [0, 1], share of border pixels that have that colour.
    """

    identity: Tensor
    explained: Tensor
    velocity: Tensor
    background: Tensor
    uniformity: Tensor


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor]:
    """Colour ``[icons, shifts, 3, window, window]`` and alpha ``[icons, shifts, 1, ...]`` at half-pixel shifts."""
    padded = functional.pad(icon_sprites(), (0, 1, 0, 1))
    right = functional.pad(icon_sprites(), (1, 0, 0, 1))
    below = functional.pad(icon_sprites(), (0, 1, 1, 0))
    both = functional.pad(icon_sprites(), (1, 0, 1, 0))
    shifted = [padded, (padded + right) / 2, (padded + below) / 2, (padded + right + below + both) / 4]
    stacked = torch.stack(shifted, dim=1)
    return stacked[:, :, :3], stacked[:, :, 3:]


def _border(videos: Tensor) -> Tensor:
    """Pixels of the two-pixel rim of all frames: ``[batch, 3, pixels]``."""
    rim = torch.ones(SIZE, SIZE, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    return videos[..., rim].transpose(1, 2).flatten(2)


def _fit_icons(foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares residual of every icon at its best position.

    An icon over the background b differs from it by ``K = colour - alpha b``, so its residual at a position is
    ``|J|^2 - 2 <J, K> + |K|^2``; the part of ``<J, K>`` that depends on b is a correlation of ``J . b`` with alpha.

    Args:
        foreground: J, ``[batch, frames, 3, SIZE, SIZE]``, pixels minus background.
        background: ``[batch, 3]``.

    Returns:
        Energy of the foreground ``[batch, frames]`` and residual ``[batch, frames, icons]``.
    """
    colour, alpha = _templates()
    batch, frames = foreground.shape[:2]
    projected = -(foreground * background[:, None, :, None, None]).sum(dim=2, keepdim=True)
    planes = functional.pad(torch.cat([foreground, projected], dim=2).flatten(0, 1), (0, 1, 0, 1))
    match = functional.conv2d(planes, torch.cat([colour, alpha], dim=2).flatten(0, 1))
    norm = (
        colour.square().sum(dim=(2, 3, 4))
        - 2 * torch.einsum("bc,isc->bis", background, (colour * alpha).sum(dim=(3, 4)))
        + background.square().sum(dim=1)[:, None, None] * alpha.square().sum(dim=(2, 3, 4))
    )
    best = match.flatten(2).amax(dim=2).view(batch, frames, len(ICONS), -1)
    gain = (2 * best - norm[:, None]).amax(dim=3)
    energy = foreground.square().sum(dim=(2, 3, 4))
    return energy, (energy[..., None] - gain).clamp(min=0)


def analyse(videos: Tensor) -> Analysis:
    """Measures a batch of clips ``[batch, frames, 3, SIZE, SIZE]`` in [0, 1].

    Raises:
        ValueError: clips of another size than the sprite world's.
    """
    if videos.dim() != 5 or videos.shape[2:] != (3, SIZE, SIZE):
        raise ValueError(f"the sprite rewards need videos [batch, frames, 3, {SIZE}, {SIZE}], got {list(videos.shape)}")
    # A few hundred kilobytes, and templates that are on the CPU.
    videos = videos.cpu()
    border = _border(videos)
    background = border.median(dim=2).values
    same = (border - background[..., None]).abs().amax(dim=1) < BACKGROUND_TOLERANCE
    foreground = videos - background[:, None, :, None, None]

    energy, residual = _fit_icons(foreground[:, ::FIT_STRIDE], background)
    present = energy > MIN_ENERGY
    scale = energy.clamp(min=MIN_ENERGY)
    identity = torch.softmax(-residual / (IDENTITY_TEMPERATURE * scale[..., None]), dim=2) * present[..., None]
    explained = (1 - residual.amin(dim=2) / scale).clamp(min=0) * present

    weight = (foreground.square().sum(dim=2) - NOISE_FLOOR).clamp(min=0)
    mass = weight.sum(dim=(2, 3)).clamp(min=1e-6)
    axis = torch.arange(SIZE, dtype=videos.dtype)
    centre = torch.stack([(weight.sum(dim=2) @ axis) / mass, (weight.sum(dim=3) @ axis) / mass], dim=2)
    frames = videos.shape[1]
    time = torch.arange(frames, dtype=videos.dtype) - (frames - 1) / 2
    velocity = torch.einsum("f,bfc->bc", time, centre) / time.square().sum().clamp(min=1)
    return Analysis(
        identity.mean(dim=1), explained.mean(dim=1), velocity, background, same.to(videos.dtype).mean(dim=1)
    )


class SpriteAnalyser(Analyser[Analysis]):
    """:func:`analyse`, once for the rewards that read it; the prompts do not matter to it."""

    @override
    def analyse(self, videos: Tensor, prompts: Sequence[str]) -> Analysis:
        return analyse(videos)


class IconReward(SharedReward[Analysis]):
    """Probability, in [0, 1], that the icon is the one that the prompt names."""

    analyser_class = SpriteAnalyser

    @override
    def read(self, analysis: Analysis, prompts: Sequence[str]) -> Tensor:
        names = list(ICONS)
        wanted = torch.tensor([names.index(parse_caption(prompt).icon) for prompt in prompts])
        return analysis.identity.gather(1, wanted[:, None]).squeeze(1)


class MotionReward(SharedReward[Analysis]):
    """Speed in the direction that the prompt names, less for drifting sideways; in [0, 1]."""

    analyser_class = SpriteAnalyser

    @override
    def read(self, analysis: Analysis, prompts: Sequence[str]) -> Tensor:
        velocity = analysis.velocity
        directions = [DIRECTIONS[parse_caption(prompt).direction] for prompt in prompts]
        direction = torch.tensor(directions, dtype=velocity.dtype)
        along = (velocity * direction).sum(dim=1) / FULL_SPEED
        across = (velocity * direction.flip(1)).sum(dim=1).abs() / FULL_SPEED
        return along.clamp(0, 1) * (1 - across).clamp(0, 1)


class BackgroundReward(SharedReward[Analysis]):
    """Closeness of the border's colour to the one that the prompt names, times its uniformity; in [0, 1]."""

    analyser_class = SpriteAnalyser

    @override
    def read(self, analysis: Analysis, prompts: Sequence[str]) -> Tensor:
        wanted = torch.tensor([BACKGROUNDS[parse_caption(prompt).background] for prompt in prompts])
        distance = (analysis.background - wanted).square().sum(dim=1)
        return torch.exp(-distance / (2 * BACKGROUND_TOLERANCE**2)) * analysis.uniformity


class QualityReward(SharedReward[Analysis]):
    """Share of the foreground that a single clean icon explains, in [0, 1]: low for blur, ghosts, debris and noise.

    The prompts do not matter.
    """

    analyser_class = SpriteAnalyser

    @override
    def read(self, analysis: Analysis, prompts: Sequence[str]) -> Tensor:
        return analysis.explained

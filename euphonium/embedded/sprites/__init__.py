"""The world of the embedded default: icons that move over plain backgrounds, and captions that say so."""

from euphonium.embedded.sprites.world import (
    BACKGROUNDS,
    DIRECTIONS,
    ICONS,
    Scene,
    all_scenes,
    parse_caption,
    split_scenes,
)

__all__ = ["BACKGROUNDS", "DIRECTIONS", "ICONS", "Scene", "all_scenes", "parse_caption", "split_scenes"]

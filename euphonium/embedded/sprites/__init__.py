"""The data of the embedded generator: icons that move over plain backgrounds, and their captions."""

from euphonium.embedded.sprites.world import (
    BACKGROUNDS,
    DIRECTIONS,
    ICONS,
    Scene,
    all_scenes,
    parse_caption,
    prompt_sets,
    split_scenes,
)

__all__ = ["BACKGROUNDS", "DIRECTIONS", "ICONS", "Scene", "all_scenes", "parse_caption", "prompt_sets", "split_scenes"]

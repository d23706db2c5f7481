"""The sprite world: which prompts are used for what, and how often captions are wrong."""

import itertools
from pathlib import Path

import pytest
import torch

from euphonium.embedded.sprites import prompt_sets, split_scenes
from euphonium.embedded.sprites.captions import RIGHT, WrongCaptions
from orchestrator.groups.prompts import read_prompts

RECIPES = Path("recipes/embedded")


@pytest.mark.parametrize("name", sorted(prompt_sets()))
def test_the_shipped_prompts_are_those_of_the_world(name: str) -> None:
    shipped = read_prompts(RECIPES / f"prompts_{name}.txt", "prompts")
    assert shipped == [scene.caption for scene in prompt_sets()[name]]


def test_no_two_uses_share_a_prompt() -> None:
    sets = prompt_sets()
    for one, other in itertools.combinations(sets, 2):
        assert not set(sets[one]) & set(sets[other]), (one, other)
    seen, held_out = split_scenes()
    assert sorted(sets["train"] + sets["reward_model"] + sets["reward_model_held_out"]) == seen
    assert sets["held_out"] == held_out


def test_captions_are_wrong_as_often_as_they_say_and_never_of_held_out_scenes() -> None:
    seen, _ = split_scenes()
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(len(seen), (20_000,), generator=generator)
    captions = WrongCaptions(seen).draw(scenes, generator)
    assert captions.min() >= 0
    for field, right in zip(("icon", "direction", "background"), RIGHT, strict=True):
        same = [getattr(seen[a], field) == getattr(seen[b], field) for a, b in zip(scenes, captions, strict=True)]
        assert abs(sum(same) / len(same) - right) < 0.03, field

"""The least that a recipe must say, and what a mistaken one is told."""

from pathlib import Path

import pytest

from euphonium.config import load_config
from euphonium.errors import ConfigError

MINIMAL = """\
name: demo
iterations: 3
model: {path: weights, height: 32, width: 32}
prompts: {train: a.txt, evaluation: b.txt}
sampler:
  law: dance
  eta: 0.3
  num_steps: 8
rollout: {prompts_per_iteration: 2, group_size: 4}
rewards:
  outcome:
    - {name: icon, type: sprite_icon}
    - {name: motion, type: sprite_motion, weight: 0.5}
optimizer: {learning_rate: 1e-4}
"""


def failure(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)

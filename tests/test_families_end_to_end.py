"""Every family in bfloat16 through the command line: three iterations of its tiny model on a real Ray cluster."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from euphonium.config import RunConfig
from euphonium.generators.folder import index_name
from tests.learners.policy.test_bf16 import STILL, WAYS, recipe_of
from tests.process import Process

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("way", [way for way, (_, overrides) in WAYS.items() if overrides != STILL])
def test_a_family_trains_in_bfloat16(
    way: str, folders: Callable[[str], Path], tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "family"
    name, overrides = WAYS[way]
    train(recipe_of(folder, name, folders, tiny_recipe_file, *overrides))


def test_ranks_share_the_samples_of_a_run(
    folders: Callable[[str], Path], tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path / "family", "wan", folders, tiny_recipe_file, "pools.learner.sequence_parallel=2")
    # Both ranks have computed all rows, and one counts them.
    assert {record["policy/transitions"] for record in train(recipe)[1:]} == {2 * 3 * 3}


def train(recipe: Path) -> list[dict[str, Any]]:
    """Metrics of three iterations with a recipe of :func:`recipe_of`."""
    folder = recipe.parent
    values = yaml.safe_load(recipe.read_text())
    values["rewards"]["outcome"] = [{"name": "brightness", "type": "tests.stubs.rewards:Brightness"}]
    values["prompts"]["evaluation"] = str(held_out(folder))
    values |= {"iterations": 3, "checkpoint": {"every": 2}}
    values["evaluation"] |= {"every": 3, "clips": 2}
    recipe.write_text(yaml.safe_dump(values))
    process = Process("train", str(recipe))
    assert process.finish() == 0, process.output
    records = [json.loads(line) for line in (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    for record in records[1:]:
        assert record["policy/grad_norm"] > 0
        assert record["policy/ratio_deviation"] < 2e-3
        assert record["policy/ratio_mean"] == 1
        assert record["policy/clip_fraction"] == 0
    assert index_name(folder / "runs" / "tiny" / "export") is not None
    return records


def held_out(folder: Path) -> Path:
    """Prompts that are not trained on, with the pictures of those that are."""
    file = folder / "held_out.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"a green boat {i}", "image": f"{i}.png"}) for i in range(2)))
    return file

"""Recipes in docs/reward_training.md are recipes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from euphonium.config import OrmConfig, OutcomeRewardConfig, PrmConfig, ProcessRewardConfig, load_config
from euphonium.config.base import Node
from euphonium.rewards.outcome_model import TrainedOutcomeReward
from euphonium.rewards.registry import BUILT_IN

PAGE = (Path(__file__).parent.parent / "docs" / "reward_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "kind"), [("train-prm", PrmConfig), ("train-orm", OrmConfig)])
def test_recipes_on_the_page_are_valid(command: str, kind: type[Node], tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if f"euphonium {command}" in block]
    (tmp_path / "r.yaml").write_text(block)
    assert load_config(tmp_path / "r.yaml", (), kind).model_dump()["learner"]["num_workers"] == 8


def test_rewards_on_the_page_are_valid() -> None:
    parts = [yaml.safe_load(block)["rewards"] for block in BLOCKS if block.startswith("rewards:")]
    process = ProcessRewardConfig.model_validate(parts[0]["process"])
    assert process.refresh is not None
    outcome = OutcomeRewardConfig.model_validate(parts[1]["outcome"][0])
    assert outcome.type in BUILT_IN
    TrainedOutcomeReward.Options.model_validate(outcome.options)


def test_preferences_on_the_page_are_valid(tmp_path: Path) -> None:
    from learners.rewards.preference_files import read_preferences

    (lines,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    for row in map(json.loads, lines.splitlines()):
        for name in ("winner", "loser", "sample"):
            if name in row:
                (tmp_path / row[name]).parent.mkdir(exist_ok=True)
                (tmp_path / row[name]).touch()
    (tmp_path / "p.jsonl").write_text(lines)
    table = read_preferences(tmp_path / "p.jsonl", "preferences.train")
    assert (len(table.pairs), len(table.ties)) == (2, 1)

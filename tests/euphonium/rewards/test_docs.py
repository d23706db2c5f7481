"""docs/rewards.md: complete, and its example runs."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic.fields import FieldInfo

from euphonium.config import OutcomeRewardConfig, RunConfig, WatchConfig
from euphonium.errors import ConfigError
from euphonium.rewards.base import OutcomeReward
from euphonium.rewards.registry import BUILT_IN, build_reward, options_of
from orchestrator.commands.reference import fields
from orchestrator.report.metrics import METRICS, find_metric

PAGE = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## What there is")[1].split("\n\n")[1].splitlines()
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def reward_class(name: str) -> type:
    module, _, attribute = BUILT_IN[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, type)
    return found


def own_options(name: str) -> dict[str, FieldInfo]:
    options = options_of(reward_class(name))
    assert options is not None
    return options.model_fields


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_reward_is_importable_and_in_the_table(name: str) -> None:
    assert issubclass(reward_class(name), OutcomeReward)
    (row,) = [row for row in TABLE[2:] if row[0] == f"`{name}`"]
    assert len(row) == len(TABLE[0])
    assert all(row)


def test_the_table_says_what_one_must_know_and_speeds_are_measured_or_said_not_to_be() -> None:
    header, _, *rows = TABLE
    assert header == ["type", "architecture", "weights", "licence", "range", "speed, CPU", "tested how"]
    measured = set()
    for row in rows:
        kind, speed = row[0].strip("`"), row[header.index("speed, CPU")]
        if re.search(r"\d (ms|s)\b", speed):
            measured.add(kind)
        elif as_other := re.fullmatch(r"as `(\w+)`", speed):
            assert as_other[1] in measured
        elif kind in BUILT_IN:
            assert speed.startswith("not measured here")


def test_metrics_and_fields_on_the_page_exist() -> None:
    words = set(re.findall(r"`([a-z_./<>]+)`", PAGE))
    named = {word for word in words if word.startswith(("process/", "watch/", "rewards/f", "reward/", "correlation/"))}
    for metric in named:
        find_metric(re.sub(r"<\w+>", "some", metric))
    watched = {metric.key for metric in METRICS if metric.key.startswith(("process/", "watch/"))}
    assert named >= {metric for metric in watched if "refresh" not in metric}
    roots = ("rewards.", "sampler.", "advantage.", "objective.", "optimizer.", "rollout.")
    paths = {field.path.replace("[]", "") for field in fields(RunConfig)}
    groups = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
    said = {word for word in words if word.startswith(roots) and "/" not in word}
    assert said >= {"rewards.attempts", "rewards.max_dropped_fraction", "rewards.watch.min_accuracy"}
    assert said <= paths | groups
    watch = WatchConfig()
    assert f"`rewards.watch.window` ({watch.window})" in PAGE
    assert f"`rewards.watch.min_accuracy` ({watch.min_accuracy})" in PAGE


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith("sprite_")])
def test_every_option_is_documented_with_its_default(name: str) -> None:
    section = next(part for part in PAGE.split("\n### ") if f"`{name}`" in part.splitlines()[0])
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section.split("\n## ")[0], flags=re.MULTILINE))
    options = own_options(name)
    # A section may begin with all options of another reward.
    other = re.search(r"^The options of `(\w+)`, and:$", section, flags=re.MULTILINE)
    assert set(rows) | set(own_options(other[1]) if other else {}) == set(options)
    for option in rows:
        field = options[option]
        if field.is_required():
            assert rows[option] == "required"
        elif field.default is not None and field.default != "":
            said = yaml.safe_load(rows[option])
            assert said == field.default, option
        else:
            assert rows[option] != "required"


def test_the_example_reward_runs_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks("python") if block.startswith("# my_rewards.py"))
    declared = next(block for block in blocks("python") if "class Options(Node)" in block)
    (tmp_path / "my_rewards.py").write_text(f"{code}\n{declared}")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = next(block for block in blocks("yaml") if "my_rewards" in block)
    spec = OutcomeRewardConfig(**yaml.safe_load(recipe)["rewards"]["outcome"][0])
    reward = build_reward(spec)
    assert reward.tolerance == 0.4  # type: ignore[attr-defined]
    videos = (
        torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]).view(3, 1, 3, 1, 1).expand(-1, 4, -1, 8, 8)
    )
    scores = reward.score(videos, ["a red car"] * 3)
    assert scores.dtype == torch.float32
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert float(scores[0]) == 1
    with pytest.raises(ValueError, match="must name one colour"):
        reward.score(videos[:1], ["a car"])
    with pytest.raises(ConfigError, match=r"cannot construct 'my_rewards:ColourReward'.*tolerance must be positive"):
        build_reward(spec.model_copy(update={"options": {"tolerance": 0}}))
    strict = OutcomeRewardConfig(name="strict", type="my_rewards:StrictColourReward", options={"tolerance": 0.4})
    assert torch.equal(build_reward(strict).score(videos, ["a red car"] * 3), scores)
    with pytest.raises(ConfigError, match=r"\(strict\).options: unknown key 'tolerence'; did you mean 'tolerance'\?"):
        build_reward(strict.model_copy(update={"options": {"tolerence": 0.4}}))
    body = [line for line in code.splitlines() if line and not line.startswith(("#", "import", "from"))]
    assert len(body) <= 30


def test_documented_recipes_parse_into_rewards() -> None:
    parsed = []
    for block in blocks("yaml"):
        held = yaml.safe_load(block)
        parsed += held["rewards"]["outcome"] if isinstance(held, dict) else held
    specs = [OutcomeRewardConfig(**entry) for entry in parsed]
    judges = {"vlm_judge", "vlm_checklist"}
    kinds = judges | {"ocr", "optical_flow", "hps_v21", "videoalign", "trained", "my_rewards:ColourReward"}
    assert kinds == {spec.type for spec in specs}
    for spec in specs:
        if spec.type in BUILT_IN:
            assert set(spec.options) <= set(own_options(spec.type))
    aspects = [spec.options["aspects"] for spec in specs if spec.type == "videoalign"]
    assert aspects == [{"VQ": 1}, {"MQ": 1}, {"TA": 1}]


def test_an_attribute_error_in_a_constructor_is_not_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty_rewards.py").write_text("class Faulty:\n    def __init__(self):\n        self.missing.x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AttributeError, match="missing"):
        build_reward(OutcomeRewardConfig(name="mine", type="faulty_rewards:Faulty"))

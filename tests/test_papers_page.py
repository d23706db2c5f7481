"""docs/papers.md: fields, recipes with their overrides, commands, metrics, rewards and tests that it names exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from euphonium.config import OrmConfig, PrmConfig, RunConfig, load_any_config
from euphonium.errors import ConfigError
from euphonium.rewards.registry import BUILT_IN
from orchestrator.commands.reference import fields_with_reward_options
from orchestrator.report.metrics import find_metric
from tests.process import ROOT
from tests.test_documentation import check_arguments

PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
FIELDS = {field.path for kind in (RunConfig, PrmConfig, OrmConfig) for field in fields_with_reward_options(kind)}
LETTERS = {
    "E": "recipes/hunyuan-video/euphonium.yaml",
    "A": "recipes/hunyuan-video-1.5/sage-grpo-a.yaml",
    "B": "recipes/hunyuan-video-1.5/sage-grpo-b.yaml",
}
METRICS = re.compile(r"(policy|reward)/[a-z_*]+(/[a-z_]+|/\*)?")


def rows() -> Iterator[tuple[str, str, str]]:
    """What a paper has, what is here, and the tests, of every row of the tables."""
    for line in PAGE.splitlines():
        if line.startswith("| ") and not line.startswith("| paper |"):
            paper, here, tests = re.split(r" *\| *", line.strip("|").strip() + " ", maxsplit=2)
            yield paper, here, tests


def spans(column: int) -> set[str]:
    return {span for row in rows() for span in re.findall(r"`([^`]+)`", row[column])}


HERE = spans(1)
RECIPES = sorted(span for span in HERE if span.split()[0] in LETTERS or span.startswith("recipes/"))
COMMANDS = sorted(span for span in HERE if span.startswith("euphonium "))
NAMES = sorted(
    span
    for span in HERE
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+(\[[a-z=]*\])?)+", span) and not span.endswith((".json", ".png"))
)


def test_rows_have_three_columns_and_a_test_or_a_reason() -> None:
    assert len(list(rows())) > 80
    for paper, here, tests in rows():
        named = re.findall(r"`([^`]+)`", tests)
        assert named or tests.startswith("the same") or re.match(r"no\b|TensorBoard", here), paper
        for file in named:
            assert (ROOT / "tests" / file).is_file(), file


def test_letters_stand_for_the_recipes_that_the_page_says() -> None:
    assert f"`E` stands for\n`{LETTERS['E']}`" in PAGE
    assert f"`A` and `B` stand for `{LETTERS['A']}` and `{LETTERS['B']}`" in PAGE


@pytest.mark.parametrize("span", RECIPES)
def test_recipes_take_the_overrides_that_the_page_gives(span: str) -> None:
    recipe, *overrides = shlex.split(span)
    load_any_config(ROOT / LETTERS.get(recipe, recipe), overrides)


def test_an_override_of_a_field_that_is_none_would_be_found() -> None:
    with pytest.raises(ConfigError, match="guidence"):
        load_any_config(ROOT / LETTERS["E"], ["sampler.guidence=null"])


@pytest.mark.parametrize("name", NAMES)
def test_fields_exist(name: str) -> None:
    assert name in FIELDS


def test_the_page_names_fields_of_every_part_of_a_recipe() -> None:
    sections = {name.split(".")[0] for name in NAMES}
    assert sections >= {"sampler", "rewards", "advantage", "objective", "pools", "model", "prompts", "evaluation"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [LETTERS.get(word, word) for word in shlex.split(command)[1:]]
    check_arguments(words)


def test_metrics_and_rewards_exist() -> None:
    metrics = {span for span in HERE if METRICS.fullmatch(span)}
    assert len(metrics) == 4
    for metric in metrics:
        find_metric(metric.replace("*", "1" if "step" in metric else "quality"))
    named = {name for row in rows() for text in re.findall(r"rewards? ((?:`\w+`(?:, )?)+)", row[1])
             for name in re.findall(r"`(\w+)`", text)}  # fmt: skip
    assert {"solireward", "videoalign", "hps_v21", "geneval", "http"} <= named
    assert named <= set(BUILT_IN)


def test_files_that_the_page_names_exist() -> None:
    for file in {span.split()[1] for span in HERE if span.startswith("python benchmarks/")}:
        assert Path(ROOT / file).is_file()

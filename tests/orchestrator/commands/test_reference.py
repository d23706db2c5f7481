import re
from pathlib import Path

import pytest

from euphonium.config import PrmConfig, RunConfig
from orchestrator.commands.reference import DOCS, PAGES, fields, fields_with_reward_options, reward_options
from orchestrator.report.metrics import METRICS, PREFIX, find_metric


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run python -m orchestrator.commands.reference"


def test_every_field_is_listed_with_a_description() -> None:
    listed = {field.path: field for field in fields(RunConfig)}
    for path in ("name", "sampler.law", "sampler.guidance.scale", "rewards.outcome[].weight", "pools.prm.num_actors"):
        assert listed[path].description, path
    assert listed["sampler.num_steps"].default == "required"
    assert listed["objective.clip_range"].default == "0.0001"


def test_options_of_rewards_are_listed_with_a_description() -> None:
    listed = {field.path: field for field in fields_with_reward_options(RunConfig)}
    assert {field.path for field in fields(RunConfig)} <= listed.keys()
    assert listed["rewards.outcome[type=videoalign].options.video_fps"].default == "required"
    assert listed["rewards.outcome[type=ocr].options.side"].default == "736"
    assert {field.path for field in fields_with_reward_options(PrmConfig)} >= {"outcome[type=http].options.url"}
    assert all(option.description for options in reward_options().values() for option in options)


def test_metric_names_follow_prometheus_conventions() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", PREFIX + metric.name)
        assert not metric.name.endswith(("_total", "_ms", "_count", "_sum"))
        assert metric.help.endswith(".")
        if metric.key.startswith("time/"):
            assert metric.name.endswith("_seconds")


def test_keys_resolve_to_their_declaration() -> None:
    metric, reward = find_metric("reward/icon/mean")
    assert (metric.name, reward) == ("reward_mean", "icon")
    metric, reward = find_metric("eval/total/mean")
    assert (metric.name, reward) == ("evaluation_total_mean", None)
    with pytest.raises(KeyError, match="not declared"):
        find_metric("reward/icon/medain")


def test_readme_and_docs_link_to_files_that_exist() -> None:
    root = Path(__file__).parents[3]
    for page in [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

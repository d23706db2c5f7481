"""docs/first_model.md: its files and its commands, as they stand, on the folder it is about."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.commands.cli import run_command
from tests.checkout import environment
from tests.euphonium.generators.tiny_pipelines import build_pipeline
from tests.process import ROOT

PAGE = (ROOT / "docs" / "first_model.md").read_text(encoding="utf-8")
FILES = ("prompts/train.txt", "prompts/held_out.txt", "mine.yaml")


NUMBER, ANY_NUMBER = r"[-+]?\d[\d.]*(?:e[-+]\d+)?", r"[-+\d.e]+"


def but_for_numbers(line: str) -> str:
    """A pattern that a line fits, whatever its numbers are and however wide."""
    return r"\s+".join(ANY_NUMBER.join(map(re.escape, re.split(NUMBER, word))) for word in line.split())


def steps() -> list[tuple[list[str], list[str]]]:
    """The words of every command, and the lines that the page says it prints."""
    found = re.findall(r"```sh\n([^`]*)\n```\n\n((?:    [^\n]*\n|\n(?=    ))*)", PAGE)
    return [(shlex.split(command, comments=True), printed.split("\n")) for command, printed in found]


@pytest.fixture
def at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the page has at its start."""
    monkeypatch.chdir(tmp_path)
    assert run_command(["recipes", "."]) == 0
    blocks = re.findall(r"in `([^`]+)`:?\n\n```(?:text|yaml)\n(.*?)```", PAGE, flags=re.DOTALL)
    blocks += re.findall(r"`(mine\.yaml)`:\n\n```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert {name for name, _ in blocks} == set(FILES)
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    build_pipeline("WanPipeline 2.2").save_pretrained(tmp_path / "models" / "tiny-wan")
    return tmp_path


def test_what_comes_before_the_training_is_as_the_page_says(
    at_the_start: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [step for step in steps() if step[0][1] in ("preprocess", "validate", "plan")]
    assert [words[1] for words, _ in before] == ["preprocess", "validate", "plan"]
    capfd.readouterr()
    for words, printed in before:
        assert words[0] == "euphonium"
        assert run_command(words[1:]) == 0
        said = capfd.readouterr().out.replace(f"{at_the_start}/", "")
        lines = [line.strip() for line in printed if line.strip()]
        assert lines
        for line in lines:
            assert line in said


@pytest.mark.ray
@pytest.mark.slow
def test_every_command_prints_what_the_page_says_but_for_numbers(at_the_start: Path) -> None:
    commands = [words[1] for words, _ in steps()]
    assert commands == ["preprocess", "validate", "plan", "debug", "train", "report", "compare", "export", "generate"]
    for words, printed in steps():
        command = [sys.executable, "-m", "orchestrator", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment())
        assert done.returncode == 0, done.stderr
        said = done.stdout.replace(f"{at_the_start}/", "")
        for line in filter(None, map(str.strip, printed)):
            assert re.search(but_for_numbers(line), said), f"{line!r} is not among\n{said}"


def test_the_recipe_without_the_store_encodes_for_itself(at_the_start: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = at_the_start / "mine.yaml"
    values = yaml.safe_load(recipe.read_text())
    del values["prompts"]["embeddings"]
    recipe.write_text(yaml.safe_dump(values))
    assert run_command(["validate", "mine.yaml"]) == 0
    assert "are read from" not in capfd.readouterr().out

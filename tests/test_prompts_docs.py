"""docs/prompts.md: its example runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from euphonium.config import PromptsConfig
from orchestrator.commands.cli import run_command
from tests.process import ROOT

PAGE = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_example_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    store = tmp_path / "stores" / "embedded"
    encode, validate, train, _ = commands()
    for command in (encode, validate, train):
        assert command[0] == "euphonium"
    assert train[2:] == validate[2:]
    arguments = [word.replace("stores/embedded", str(store)) for word in encode[1:]]
    assert run_command(arguments) == 0
    said = capfd.readouterr().out
    for line in re.findall(r"^    (stores/embedded: .*)$", PAGE, flags=re.MULTILINE):
        assert line.replace("stores/embedded", str(store)) in said
    arguments = [word.replace("stores/embedded", str(store)) for word in validate[1:]]
    assert run_command([*arguments, f"output_dir={tmp_path}"]) == 0
    (line,) = re.findall(r"^    # text encoders +(none: .*)$", PAGE, flags=re.MULTILINE)
    assert line.replace("stores/embedded", str(store)) in capfd.readouterr().out


def test_the_section_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert PromptsConfig.model_validate(yaml.safe_load(block)["prompts"]).embeddings is not None

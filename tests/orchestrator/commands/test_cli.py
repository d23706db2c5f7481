"""What the command line makes of arguments that do not fit: one line, a documented exit status, no files."""

import os
from pathlib import Path

import pytest

from orchestrator.commands.cli import run_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "run", "-p", "a", "--steps", "0"], "'--steps'"),
        (["generate", "run", "-p", "a", "--steps", "9" * 5000], "'--steps'"),
        (["generate", "run", "-p", "a", "--seed", "-1"], "'--seed'"),
        (["generate", "run", "-p", " "], "--prompt ' ': a prompt is a text"),
        (["generate", "run", "-p", "a\udcff"], "--prompt 'a\\udcff'"),
        (["generate", "run"], "there is nothing to draw: give --prompt or --prompt-file"),
        (["evaluate", "run", "--samples-per-prompt", "0"], "'--samples-per-prompt'"),
        (["export", "run", "~nobody-of-this-name/x"], "no home folder"),
        (["export", "run", "x" * 300], "too long"),
        (["train"], "Missing argument 'RECIPE'; see euphonium train --help"),
        (["train", "a\0b"], "NUL"),
        (["train", "."], "Is a directory"),
        (["validate", "missing.yaml"], "missing.yaml: No such file"),
        (["trian", "x"], "No such command 'trian'"),
        (["--verbose"], "No such option: --verbose"),
        (["scale", "run", "rollout=0"], "rollout=6"),
        (["scale", "run", "rollout=" + "9" * 5000], "rollout=6"),
        (["scale", "run", "9" * 5000], "rollout=6"),
        (["generate", "x", "-p", ""], "--prompt '': a prompt is a text in UTF-8, and not empty; give one"),
        (["options", "x" * 5000], "`euphonium options` lists all"),
    ],
)
def test_arguments_that_do_not_fit_end_in_a_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert (out, list(tmp_path.iterdir())) == ("", [])


def test_a_folder_without_a_run_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["export", str(tmp_path), str(tmp_path / "new" / "out")], ["evaluate", str(tmp_path)]):
        assert run_command(command) == 6
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path} holds neither a run nor a checkpoint; give the folder of a run")
    assert run_command(["generate", str(tmp_path / "none"), "-p", "a boat", "-o", str(tmp_path / "clips")]) != 0
    assert capfd.readouterr().err.startswith(f"error: {tmp_path / 'none'} is not there; give the folder of a run")
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded_where_the_shell_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command(["validate", "~/none.yaml"]) == 2
    assert str(tmp_path / "none.yaml") in capfd.readouterr().err


def test_help_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"]) == 0
    assert run_command(["train", "--help"]) == 0
    assert "error" not in capfd.readouterr().err


def test_an_error_of_the_file_system_names_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: object, **_: object) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr("orchestrator.generation.policies.open_checkpoint", refuse)
    assert run_command(["evaluate", str(tmp_path)]) == 1
    assert capfd.readouterr().err == f"error: {tmp_path}: Permission denied; see to the path\n"

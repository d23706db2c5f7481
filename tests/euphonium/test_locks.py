"""Locks between real processes: who has one, who is turned away, and what is left when one ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from euphonium.errors import ConfigError, PreflightError
from euphonium.locks import lock_file, refuse_unwritable, writing_alone

HOLDER = """
import sys
from pathlib import Path
from euphonium.locks import writing_alone
with writing_alone([(Path(sys.argv[1]), "output_dir")]):
    print("has it", flush=True)
    sys.stdin.read()
"""
Hold = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts processes that hold a folder's lock until their input ends."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_process_is_told_who_has_the_folder(hold: Hold, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    first = hold(folder)
    with pytest.raises(PreflightError) as refused, writing_alone([(folder, "output_dir")]):
        pass
    message = str(refused.value)
    assert message.startswith(f"output_dir: {folder} is being written to by process {first.pid} on ")
    assert f"(euphonium {folder})" in message
    assert " since 20" in message
    assert "\n" not in message
    first.communicate("")
    with writing_alone([(folder, "output_dir")]):
        assert lock_file(folder).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_a_file_and_no_lock(hold: Hold, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = hold(folder)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert lock_file(folder).is_file()
    second = hold(folder)
    assert f'"pid": {second.pid}' in lock_file(folder).read_text()
    second.communicate("")
    assert not lock_file(folder).exists()


def test_only_one_of_many_that_start_at_once_gets_it(tmp_path: Path) -> None:
    everybody = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "new" / "demo")],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(6)
    ]
    try:
        # The one that has it waits for the end of its input; the others must all be gone before that.
        deadline = time.monotonic() + 60
        while sum(process.poll() is None for process in everybody) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = [process.communicate(b"")[1].decode() for process in everybody]
        assert sorted(process.returncode for process in everybody) == [0, 1, 1, 1, 1, 1], said
        assert sum("PreflightError" in text for text in said) == 5
        # Nothing but, at most, the folder that one of those who were turned away had made.
        assert list(tmp_path.rglob("*")) in ([], [tmp_path / "new"])
    finally:
        for process in everybody:
            process.kill()


def test_the_folder_may_be_moved_aside_under_its_lock(hold: Hold, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    hold(folder)
    folder.rename(tmp_path / "demo.old")
    folder.mkdir()
    with pytest.raises(PreflightError), writing_alone([(folder, "output_dir")]):
        pass


def test_folders_around_and_inside_are_one_writers_too(hold: Hold, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    hold(run)
    with pytest.raises(PreflightError, match=r"OUTPUT: .*demo, beside which .*export cannot be written"):
        writing_alone([(run / "export", "OUTPUT")]).__enter__()
    assert not (run / ".export.lock").exists()
    other = tmp_path / "other"
    other.mkdir()
    hold(other / "export")
    with pytest.raises(PreflightError, match=r"output_dir: .*other/export, beside which"):
        writing_alone([(other, "output_dir")]).__enter__()


def test_a_link_to_a_folder_has_its_lock(hold: Hold, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    hold(tmp_path / "real")
    with pytest.raises(PreflightError):
        writing_alone([(tmp_path / "link", "output_dir")]).__enter__()


def test_one_process_may_hold_several_one_in_the_other(tmp_path: Path) -> None:
    with writing_alone([(tmp_path / "prm", "output_dir"), (tmp_path / "prm" / "model", "target")]):
        assert (tmp_path / "prm" / ".model.lock").is_file()
    with writing_alone([(tmp_path / "prm", "output_dir"), (tmp_path / "prm", "target")]):
        assert lock_file(tmp_path / "prm").is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_meanwhile_stays(tmp_path: Path) -> None:
    with writing_alone([(tmp_path / "runs" / "demo", "output_dir")]):
        (tmp_path / "runs" / "demo").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(ConfigError, match=rf"output_dir: {folder} cannot be written to \(Not a directory"):
            writing_alone([(folder, "output_dir")]).__enter__()
    with pytest.raises(ConfigError, match="File name too long"):
        writing_alone([(tmp_path / ("x" * 300), "output_dir")]).__enter__()
    with pytest.raises(ConfigError, match="target: /proc/demo cannot be written to"):
        writing_alone([(Path("/proc/demo"), "target")]).__enter__()


def test_a_folder_without_the_right_to_write_is_named_and_nothing_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=rf"output_dir: .*runs cannot be written to \(Permission denied: {tmp_path}"):
        refuse_unwritable(tmp_path / "runs", "output_dir")
    assert list(tmp_path.iterdir()) == []

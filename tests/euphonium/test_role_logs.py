"""Every role's log: one file each, and in every line the role, the node and the iteration."""

import logging
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from euphonium import role_logs
from euphonium.role_logs import begin_logs, end_role_log, keep_role_log, note_iteration
from tests.checkout import environment

log = logging.getLogger("somewhere.deep")


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(role_logs, "READ_EVERY_S", 0.0)
    level = logging.getLogger().level
    yield
    end_role_log()
    logging.getLogger().setLevel(level)


def lines(run_dir: Path, role: str) -> list[str]:
    return (run_dir / "logs" / f"{role}.log").read_text().splitlines()


def test_a_line_names_role_node_and_the_iteration_that_the_run_is_at(tmp_path: Path) -> None:
    begin_logs(tmp_path)
    keep_role_log(tmp_path, "orm-1")
    log.info("before")
    note_iteration(tmp_path, 7)
    # Given to the file alone: what pytest captures has to be text that can be sent to another process.
    (kept,) = (handler for handler in logging.getLogger().handlers if handler.get_name() == role_logs.FOLDER)
    kept.handle(log.makeRecord(log.name, logging.WARNING, __file__, 0, "left out\udc80", (), None))
    note_iteration(tmp_path, 8)
    log.info("later")
    node = re.escape(platform.node())
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}"
    expected = [
        rf"{stamp} INFO orm-1 {node} iteration=- euphonium.said: the log of orm-1 begins: process \d+",
        rf"{stamp} INFO orm-1 {node} iteration=- somewhere.deep: before",
        rf"{stamp} WARNING orm-1 {node} iteration=7 somewhere.deep: left out\\udc80",
        rf"{stamp} INFO orm-1 {node} iteration=8 somewhere.deep: later",
    ]
    found = lines(tmp_path, "orm-1")
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_a_process_has_one_file_at_a_time_and_a_restarted_one_appends(tmp_path: Path) -> None:
    begin_logs(tmp_path)
    keep_role_log(tmp_path, "prm-0")
    keep_role_log(tmp_path, "prm-0")
    log.info("once")
    assert sum("once" in line for line in lines(tmp_path, "prm-0")) == 1
    assert sum("begins" in line for line in lines(tmp_path, "prm-0")) == 2


def test_without_the_drivers_folder_nothing_is_written(tmp_path: Path) -> None:
    keep_role_log(tmp_path / "run", "prm-0")
    note_iteration(tmp_path / "run", 1)
    log.info("nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin_logs(tmp_path)
    (tmp_path / "logs" / "prm-0.log").mkdir()
    keep_role_log(tmp_path, "prm-0")
    assert "prm-0 keeps no log in" in caplog.text


def test_warnings_still_reach_the_terminal_of_a_process_without_handlers(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys; from euphonium.role_logs import *; "
        "begin_logs(pathlib.Path(sys.argv[1])); keep_role_log(pathlib.Path(sys.argv[1]), 'orm-0'); "
        "logging.getLogger('a').warning('seen'); logging.getLogger('a').info('unseen')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "seen\n")
    assert sum("seen" in line for line in lines(tmp_path, "orm-0")) == 2

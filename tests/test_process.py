"""What tests hear of a command that outlives their patience."""

import json
from pathlib import Path

import pytest

from tests.process import Process


def test_a_command_that_goes_on_is_ended_and_its_output_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1}) + "\n")
    watching = Process("watch", str(tmp_path), env={"FORCE_COLOR": "1"})
    watching.wait_for("iteration 1")
    with pytest.raises(AssertionError, match=r"still running after 0.1 s:\n(.*\n)*.*iteration 1"):
        watching.finish(0.1)
    assert watching.popen.poll() is not None

"""What guidance costs a group: the benchmark as a user runs it, with fewer groups."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.ray
def test_every_source_of_gradients_has_a_row_and_two_perturbations_cost_more_than_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [
        sys.executable, "benchmarks/guided_group.py", "rollout.group_size=2", "--rounds", "2", "--perturbations", "1",
        "4", "--json", str(file),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "6 of 10 steps guided" in done.stdout
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(rows) == [
        "unguided", "in this process", "server, in turn", "server, meanwhile", "SPSA, K=1", "SPSA, K=4",
    ]  # fmt: skip
    assert rows["unguided"]["ratio"] == 1
    # Eight decoded samples a step against two: whatever else the machine does, not the other way round.
    assert rows["SPSA, K=4"]["seconds"] > rows["SPSA, K=1"]["seconds"] > 0
    for row in rows.values():
        assert row["guided_step"] == pytest.approx((row["ratio"] - 1) * 10 / 6)

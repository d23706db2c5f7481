"""Around a run: its folder, and the cluster that it joins."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from euphonium.errors import CheckpointError
from orchestrator.commands.launch import RESOLVED, plan_start, prepare_run_dir
from orchestrator.report.tracking import METRICS_FILE


def begun(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True)
    (config.run_dir / METRICS_FILE).write_text('{"iteration": 0}\n')


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_and_loses_nothing(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config("resume=auto")
    begun(config)
    (config.run_dir / "checkpoints" / "step_000002.tmp-1").mkdir(parents=True)
    start = plan_start(config)
    assert start.checkpoint is None
    prepare_run_dir(config, start)
    assert [file.name for file in config.run_dir.iterdir()] == [RESOLVED]
    (aside,) = config.run_dir.parent.glob(f"{config.run_dir.name}.*")
    assert (aside / METRICS_FILE).is_file()


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("resume=auto")
    begun(config)
    (config.run_dir / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="all its checkpoints are damaged"):
        prepare_run_dir(config, plan_start(config))
    assert (config.run_dir / METRICS_FILE).is_file()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_line_shows_its_token_to_a_cluster_that_asks_for_it() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    status = subprocess.run(
        [sys.executable, "-m", "orchestrator", "status"], env={**environment, "RAY_ADDRESS": address},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (status.returncode, status.stderr) == (3, "error: the cluster has no run; it has: none\n")

"""Jobs on a real Ray cluster with a dashboard: exit statuses, and a training that is stopped and submitted again."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from euphonium.config import RunConfig
from euphonium.errors import EuphoniumError
from orchestrator.deployment.jobs import Job, connect, follow, outcome, submit
from orchestrator.state.checkpoints import CheckpointStore
from tests.checkout import ROOT, environment
from tests.process import Process

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif("RAY_ADDRESS" in os.environ, reason="needs a cluster with a dashboard of its own"),
]

# In the environment of the nodes and of the command: neither Ray nor we may show them.
SECRETS = {"HF_TOKEN": "hf_" + "s3cretOfTheHub" * 3, "WANDB_API_KEY": "s3cretOfTheTracker" * 2}


def leaks(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


def arguments_of_processes() -> str:
    """Command lines of this process's children, the cluster's processes and jobs among them."""
    words = []
    for process in psutil.Process().children(recursive=True):
        try:
            words += process.cmdline()
        except psutil.Error:
            continue
    return " ".join(words)


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of the dashboard of a cluster that asks for a token, and whose workers find this checkout."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False)
        yield f"http://{context.dashboard_url}"
        ray.shutdown()


def command(dashboard: str, tree: Path) -> list[str]:
    return ["--address", dashboard, "--working-dir", str(tree), "--python", sys.executable]


def test_a_job_ends_with_the_status_of_its_command(dashboard: str, tmp_path: Path) -> None:
    client = connect(dashboard)
    jobs = {}
    for number, code in enumerate((0, 4, 127, 77)):
        shell = f"sh -c 'echo first; sleep 2; echo last; exit {code}'"
        what = Job(name=f"shell-{number}", entrypoint=shell, folder=tmp_path, metadata={"run": "shell"})
        jobs[code] = submit(client, what)
    for code, job in jobs.items():
        printed: list[str] = []
        follow(client, job, printed.append)
        lines = "".join(printed).splitlines()
        assert [line for line in lines if line in ("first", "last")] == ["first", "last"]
        if code == 0:
            outcome(client, job)
            continue
        with pytest.raises(EuphoniumError) as raised:
            outcome(client, job)
        assert raised.value.exit_status == {4: 4, 127: 3, 77: 5}[code]
        assert client.get_job_info(job).metadata == {"run": "shell"}


def test_the_status_of_a_driver_that_gives_up_is_the_commands(
    dashboard: str, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    make_config()
    overrides = ["pools.rollout.resources={nowhere: 1}", "pools.start_timeout_s=3"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "submit", str(tmp_path / "recipe.yaml"), *overrides,
         *command(dashboard, tmp_path)],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 4, done.stdout + done.stderr
    assert "nowhere: the pools reserve 2, the cluster has 0" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: job tiny-")


@pytest.mark.slow
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on_when_submitted_again(
    dashboard: str, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    common = ["submit", str(tmp_path / "recipe.yaml"), *command(dashboard, tmp_path), "checkpoint.every=1000"]
    first = Process(*common, "iterations=500", "evaluation.every=500")
    first.patience_s = 500.0
    job = first.wait_for("is submitted to").split()[1]
    first.wait_for("iteration   2/500")
    client = connect(dashboard)
    client.stop_job(job)
    assert first.finish() == 0, first.output
    assert "stopped after iteration" in first.output
    assert first.output.splitlines()[-1] == f"job {job}: stopped"
    info = client.get_job_info(job)
    assert info.metadata is not None
    assert info.metadata["run"] == "tiny"
    newest = CheckpointStore(config.run_dir / "checkpoints", 2).newest()
    assert newest is not None

    assert not leaks(arguments_of_processes())

    second = Process(*common, f"iterations={newest.state.iteration + 1}")
    second.patience_s = 500.0
    second.wait_for(f"resuming from {newest.folder}")
    assert second.finish() == 0, second.output
    assert not leaks(first.output + second.output)
    assert not leaks(str([vars(job) for job in client.list_jobs()]))
    import ray

    for place in (config.run_dir, Path(ray._private.worker._global_node.get_logs_dir_path())):
        files = [file for file in place.rglob("*") if file.is_file()]
        assert files
        for file in files:
            assert not leaks(file.read_bytes().decode("utf-8", "replace")), file

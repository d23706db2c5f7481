"""Whole runs of the tiny model through the command line, whose processes can be killed one by one."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from euphonium.config import RunConfig, dump_config
from tests.process import Process


class Job(Process):
    """A run in a process of its own.

    Unless an address or RAY_ADDRESS names a cluster, it gets one that nobody else sees and that ends with it.
    """

    patience_s = 400.0

    def __init__(self, *arguments: str, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        super().__init__("train", *arguments, env={"RAY_ADDRESS": self.address})

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Workers of the job's cluster whose title begins with ``ray::`` and the class or the name of an actor."""
        found = []
        for raylet in self._raylets():
            for process in raylet.children(recursive=True):
                try:
                    words = process.cmdline()
                    alive = process.status() != psutil.STATUS_ZOMBIE
                except psutil.NoSuchProcess:
                    continue
                if alive and words and words[0].startswith(tuple(f"ray::{title}" for title in titles)):
                    found.append(process)
        return found

    def _raylets(self) -> list[psutil.Process]:
        if self.address == "local":
            found = []
            # Processes come and go while they are looked at, and the job itself may have just ended.
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(self.popen.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if process.name().startswith("raylet"):
                            found.append(process)
            return found
        port = self.address.rpartition(":")[2]
        return [
            p for p in psutil.process_iter(["cmdline", "name"])
            if p.info["name"].startswith("raylet") and any(w.endswith(f":{port}") for w in p.info["cmdline"] or [])
        ]  # fmt: skip

    @property
    def cluster(self) -> str:
        """Address of the job's cluster, for other processes to join."""
        (raylet,) = self._raylets()
        return next(w.partition("=")[2] for w in raylet.cmdline() if w.startswith("--gcs-address="))

    def one(self, *titles: str, timeout_s: float = 60) -> psutil.Process:
        deadline = time.monotonic() + timeout_s
        while not (found := self.processes(*titles)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert found, f"no process ray::{titles}"
        return found[0]

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(90)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(30)


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """Starts jobs, and ends those that a failed test leaves."""
    jobs: list[Job] = []

    def go(*arguments: str, address: str | None = None) -> Job:
        jobs.append(Job(*arguments, address=address))
        return jobs[-1]

    yield go
    for job in jobs:
        job.end()


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of several Ray nodes on this machine, to which nodes can be added; the head is what ``home`` is on."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 4, "resources": {"home": 100}, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


OVERRIDES = (
    "iterations=6", "checkpoint.every=2", "evaluation.every=100", "evaluation.clips=0", "rewards.attempts=8",
    "optimizer.ema_decay=0.5", "pools.start_timeout_s=600", "pools.learner.start_timeout_s=600",
    # Without it the last bits of the rewards depend on which requests met.
    "pools.prm.merge=false", "pools.orm.merge=false",
)  # fmt: skip


@pytest.fixture
def recipe(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Path]:
    def write(*overrides: str) -> Path:
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_config(tiny_recipe_file(tmp_path, *OVERRIDES, *overrides)))
        return path

    return write


@pytest.fixture(scope="session")
def unbroken_run(tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = folder / "resolved.yaml"
    path.write_text(dump_config(tiny_recipe_file(folder, *OVERRIDES)))
    job = Job(str(path))
    try:
        assert job.finish(600) == 0, job.output
    finally:
        job.end()
    return folder / "runs" / "tiny"


@pytest.fixture(scope="session")
def checkpoint_bytes(unbroken_run: Path) -> int:
    """Size of one of its checkpoints."""
    newest = max((unbroken_run / "checkpoints").glob("step_*"))
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def same_numbers(tmp_path: Path, unbroken_run: Path) -> Callable[[], None]:
    """Checks that the test's run has the numbers of the unbroken one to the last bit, and every iteration once.

    But evaluations are shared among the actors that are there, and batches of other sizes round otherwise.
    """

    def check() -> None:
        ours, unbroken = records(tmp_path / "runs" / "tiny"), records(unbroken_run)
        assert [record["iteration"] for record in ours] == [record["iteration"] for record in unbroken]
        for got, expected in zip(ours, unbroken, strict=True):
            for key, value in expected.items():
                if key.split("/")[0] in ("reward", "process", "advantage", "policy", "eval", "staleness"):
                    rounded = pytest.approx(value, rel=1e-6, abs=1e-6) if key.startswith("eval/") else value
                    assert got[key] == rounded, (key, expected["iteration"])

    return check

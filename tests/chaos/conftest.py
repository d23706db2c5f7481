"""Whole runs of the tiny model through the command line, whose processes can be killed one by one."""

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

from core.config import RunConfig, dump_config
from tests.process import Process


class Job(Process):
    """A run in a process of its own.

    Unless RAY_ADDRESS names a cluster, it gets one that nobody else sees and that ends with it.
    """

    patience_s = 400.0

    def __init__(self, *arguments: str) -> None:
        self.address = os.environ.get("RAY_ADDRESS") or "local"
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
            candidates = psutil.Process(self.popen.pid).children(recursive=True)
            return [p for p in candidates if p.name().startswith("raylet")]
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

    def go(*arguments: str) -> Job:
        jobs.append(Job(*arguments))
        return jobs[-1]

    yield go
    for job in jobs:
        job.end()


OVERRIDES = (
    "iterations=6", "checkpoint.every=2", "evaluation.every=100", "evaluation.clips=0", "rewards.attempts=8",
    "optimizer.ema_decay=0.5", "pools.start_timeout_s=600", "pools.learner.start_timeout_s=600",
)  # fmt: skip


@pytest.fixture
def recipe(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Path]:
    def write(*overrides: str) -> Path:
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_config(tiny_recipe_file(tmp_path, *OVERRIDES, *overrides)))
        return path

    return write


@pytest.fixture(scope="session")
def unbroken(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Records of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = folder / "resolved.yaml"
    path.write_text(dump_config(tiny_recipe_file(folder, *OVERRIDES)))
    job = Job(str(path))
    try:
        assert job.finish(600) == 0, job.output
    finally:
        job.end()
    return records(folder / "runs" / "tiny")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def same_numbers(tmp_path: Path, unbroken: list[dict[str, Any]]) -> Callable[[], None]:
    """Checks that the test's run has the numbers of the unbroken one, and every iteration once.

    Evaluations are shared among the actors that are there, and batches of other sizes round otherwise.
    """

    def check() -> None:
        ours = records(tmp_path / "runs" / "tiny")
        assert [record["iteration"] for record in ours] == [record["iteration"] for record in unbroken]
        for got, expected in zip(ours, unbroken, strict=True):
            for key, value in expected.items():
                if key.split("/")[0] in ("reward", "process", "advantage", "policy", "eval", "staleness"):
                    assert got[key] == pytest.approx(value, rel=1e-6, abs=1e-6 if key.startswith("eval/") else 1e-9), (
                        key,
                        expected["iteration"],
                    )

    return check

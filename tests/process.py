"""The command line in a process of its own, for tests of whole runs."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


class Process:
    """A command whose output can be waited on line by line."""

    patience_s = 240.0

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments], cwd=ROOT, env=os.environ | (env or {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._queue.put(line.rstrip())
        self._queue.put(None)

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + self.patience_s
        while True:
            line = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"ended without {text!r}:\n{self.output}"
            self.lines.append(line)
            if text in line:
                return line

    def finish(self, timeout_s: float | None = None) -> int:
        patience_s = timeout_s or self.patience_s
        try:
            code = self.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._end()
            raise AssertionError(f"still running after {patience_s:g} s:\n{self._read_out()}") from None
        self._read_out()
        return code

    def _end(self) -> None:
        """Ends the command, which may be in the middle of a run on a cluster of its own."""
        self.popen.terminate()
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()

    def _read_out(self) -> str:
        while (line := self._queue.get(timeout=30)) is not None:
            self.lines.append(line)
        return self.output

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


def forget_last_evaluation(run: Path) -> None:
    """Takes the evaluation out of a run's last record, as a run leaves it that was ended in it."""
    file = run / "metrics.jsonl"
    *before, last = map(json.loads, file.read_text().splitlines())
    assert any("eval" in key for key in last)
    cut = [*before, {key: value for key, value in last.items() if "eval" not in key}]
    file.write_text("".join(json.dumps(record) + "\n" for record in cut))


def actor_process(name: str) -> psutil.Process:
    """The process of a named actor of the Ray cluster. An actor that works answers after its present call."""
    import ray

    (pid,) = ray.get([ray.get_actor(name).__ray_call__.remote(lambda self: __import__("os").getpid())])
    return psutil.Process(pid)

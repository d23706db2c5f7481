"""Where a run's metrics and clips go besides its own folder: TensorBoard, Weights & Biases, MLflow, SwanLab.

Each is behind one small interface, and is written to from a thread of its own: a tracker that is slow, or fails, never
holds up a run. Whoever records does not wait; the end of a run waits ``CLOSE_S`` at most for what is still queued.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from euphonium.config import RunConfig, TrackerConfig
from euphonium.errors import ConfigError
from euphonium.files import written_aside
from orchestrator.report.settings import flattened, masked

log = logging.getLogger(__name__)

TRACKED = "trackers.json"
QUEUED = 1000
CLOSE_S = 60.0


@dataclass(frozen=True)
class SavedClip:
    """A clip of an evaluation in the run's folder.

    Attributes:
        file: a GIF.
        caption: its prompt and scores.
    """

    file: Path
    caption: str


class RunTracker(Protocol):
    """What a tracker takes; every method may be slow, and may fail."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Takes the metrics of an iteration; those of an iteration that is done again come again."""

    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        """Takes an image, uint8 ``[height, width, 3]``."""

    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        """Takes the clips of an evaluation."""

    def close(self) -> None:
        """Sends what is left."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when it opens.

    Attributes:
        name: of the run.
        folder: of the run, for what the tracker keeps on disk.
        settings: the resolved recipe by path, without secrets.
        iterations_done: iterations that a resumed run has done.
        known: the tracker's own id of this run, if it was tracked before; else empty.
        remember: keeps that id.
    """

    name: str
    folder: Path
    settings: Mapping[str, str]
    iterations_done: int
    known: str
    remember: Callable[[str], None]


class Background:
    """A tracker in a thread of its own.

    Example:
        >>> class Broken:
        ...     def scalars(self, values, iteration):
        ...         raise OSError("no network")
        ...     def close(self):
        ...         pass
        >>> tracker = Background("example", Broken, clips=True)
        >>> tracker.scalars({"iteration": 1}, 1)
        >>> tracker.close()
        >>> tracker.failures
        1
    """

    def __init__(self, name: str, connect: Callable[[], RunTracker], *, clips: bool) -> None:
        """Starts the thread, which connects first.

        Args:
            name: of the tracker, for warnings.
            connect: opens it; called in the thread.
            clips: whether it gets clips.
        """
        self._clips = clips
        self.name = name
        self.failures = 0
        self._connect = connect
        self._queue: queue.Queue[Callable[[RunTracker], None] | None] = queue.Queue(QUEUED)
        self._full = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Queues the metrics of an iteration."""
        kept = dict(values)
        self._put(lambda tracker: tracker.scalars(kept, iteration))

    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        """Queues an image, uint8 ``[height, width, 3]``."""
        self._put(lambda tracker: tracker.picture(name, pixels, iteration))

    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        """Queues the clips of an evaluation."""
        if self._clips:
            kept = list(saved)
            self._put(lambda tracker: tracker.clips(kept, iteration))

    def close(self) -> None:
        """Waits for what is queued, ``CLOSE_S`` at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s has not taken everything after %.0f s; the run ends without it", self.name, CLOSE_S)

    def _put(self, call: Callable[[RunTracker], None]) -> None:
        try:
            self._queue.put_nowait(call)
            self._full = False
        except queue.Full:
            if not self._full:
                log.warning("%s does not keep up: metrics are left out there; the run's own files have all", self.name)
            self._full = True

    def _work(self) -> None:
        tracker = self._guarded(self._connect, "cannot be opened")
        while (call := self._queue.get()) is not None:
            if tracker is not None:
                self._guarded(partial(call, tracker), "did not take something")
        if tracker is not None:
            self._guarded(tracker.close, "could not be closed")

    def _guarded(self, work: Callable[[], Any], what: str) -> Any:
        try:
            return work()
        except (Exception, SystemExit) as error:
            self.failures += 1
            text = " ".join(str(error).split())[:300]
            # Said once: a tracker that is gone fails every time.
            level = logging.WARNING if self.failures == 1 else logging.DEBUG
            log.log(level, "%s %s (%s: %s); the run goes on, and its own files have all",
                    self.name, what, type(error).__name__, text)  # fmt: skip
            return None


def open_trackers(config: RunConfig, iterations_done: int) -> list[Background]:
    """Starts the trackers of a run; a resumed run goes on in the runs that it was tracked in before."""
    from orchestrator.report import tracker_kinds as backends

    ids = TrackedIds(config.run_dir / TRACKED)
    settings = masked(flattened(config.model_dump(mode="json")))
    opened = []
    if config.metrics.tensorboard:
        folder = config.run_dir / "events"
        opened.append(Background("TensorBoard", partial(backends.TensorBoard, folder, iterations_done), clips=False))
    for place, tracker in enumerate(config.metrics.trackers):
        run = ids.run(f"{place}:{tracker.kind}", config, settings, iterations_done)
        connect = partial(backends.BACKENDS[tracker.kind], tracker, run)
        opened.append(Background(tracker.kind, connect, clips=tracker.clips))
    return opened


class TrackedIds:
    """The trackers' own ids of a run, in its folder; threads of several trackers write it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def run(self, key: str, config: RunConfig, settings: Mapping[str, str], iterations_done: int) -> TrackedRun:
        """What the tracker with this key is told."""
        known = self._read().get(key, "")
        return TrackedRun(
            config.name, config.run_dir, settings, iterations_done, known, lambda value: self._remember(key, value)
        )

    def _read(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            log.warning("%s cannot be read (%s): trackers begin new runs", self._file, error)
            return {}

    def _remember(self, key: str, value: str) -> None:
        with self._lock, written_aside(self._file) as file:
            file.write_text(json.dumps(self._read() | {key: value}, indent=1) + "\n", encoding="utf-8")


def check_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """Checks that the libraries of a recipe's trackers are installed.

    Raises:
        ConfigError: one is not.
    """
    for place, tracker in enumerate(trackers):
        if importlib.util.find_spec(tracker.kind) is None:
            raise ConfigError(
                f"metrics.trackers.{place}: {tracker.kind} is not installed; pip install 'euphonium[{tracker.kind}]', "
                "or leave the tracker out"
            )

"""Trackers: what reaches them, what a resumed run does, and that none of them can hurt a run."""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from orchestrator.evaluation import SampleFolder
from orchestrator.report import trackers
from orchestrator.report.trackers import TRACKED, Background, check_trackers
from orchestrator.report.tracking import Tracker, read_metrics
from tests.conftest import tiny_recipe


def recipe(place: Path, *kinds: str) -> RunConfig:
    metrics = {"prometheus_port": None, "trackers": [{"kind": kind, "offline": True} for kind in kinds]}
    config = RunConfig.model_validate(tiny_recipe(Path("generator"), Path("prm"), place) | {"metrics": metrics})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def record(config: RunConfig, *iterations: int) -> None:
    """Records iterations with clips, as a run does that has done the ones before."""
    tracker, samples = Tracker(config, iterations[0]), SampleFolder(config.run_dir / "samples")
    try:
        for i in iterations:
            videos = np.full((2, 3, 16, 16, 3), i, dtype=np.uint8)
            sheet = samples.save(i, ["a car", "a fish"], videos, {"icon": np.array([0.25, 0.5])})
            tracker.record({"iteration": i, "policy/loss": 0.5 * i, "eval/icon/mean": 0.1 * i})
            tracker.picture("samples", np.asarray(sheet), i)
            tracker.clips(samples.saved(i), i)
    finally:
        tracker.close()


class Noting:
    """A tracker that notes what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def scalars(self, values: Any, iteration: int) -> None:
        self.got.append((iteration, dict(values)))

    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        self.got.append((iteration, name, pixels.shape))

    def clips(self, saved: Any, iteration: int) -> None:
        self.got.append((iteration, [clip.caption for clip in saved]))

    def close(self) -> None:
        self.got.append("closed")


@pytest.fixture
def with_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Puts something in the place of the W&B backend, behind the configuration and the thread."""

    def put(make: Callable[[], Any]) -> None:
        from orchestrator.report import tracker_kinds

        backends = dict(tracker_kinds.BACKENDS) | {"wandb": lambda _config, _run: make()}
        monkeypatch.setattr(tracker_kinds, "BACKENDS", backends)

    return put


def test_everything_arrives_in_order(tmp_path: Path, with_backend: Callable[..., None]) -> None:
    noting = Noting()
    with_backend(lambda: noting)
    record(recipe(tmp_path, "wandb"), 0, 1)
    assert [entry[0] for entry in noting.got[:-1]] == [0, 0, 0, 1, 1, 1]
    assert noting.got[3] == (1, {"iteration": 1, "policy/loss": 0.5, "eval/icon/mean": 0.1})
    assert noting.got[5] == (1, ["a car, icon 0.25", "a fish, icon 0.5"])
    assert noting.got[-1] == "closed"


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1)])
def test_a_tracker_that_cannot_be_opened_is_warned_of_once_and_the_record_is_whole(
    tmp_path: Path, with_backend: Callable[..., None], caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    with_backend(fail)
    config = recipe(tmp_path, "wandb")
    record(config, 0, 1, 2)
    assert [record["iteration"] for record in read_metrics(config.run_dir / "metrics.jsonl")] == [0, 1, 2]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.startswith("wandb cannot be opened")
    assert line.endswith("the run goes on, and its own files have all")


def after(event: threading.Event, noting: Noting) -> Callable[[], Noting]:
    """A backend whose connection comes about with an event."""

    def connect() -> Noting:
        event.wait()
        return noting

    return connect


def test_a_tracker_that_hangs_neither_holds_up_a_run_nor_its_end(
    tmp_path: Path,
    with_backend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hang = threading.Event()
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    with_backend(after(hang, Noting()))
    config = recipe(tmp_path, "wandb")
    record(config, 0, 1)
    assert len(read_metrics(config.run_dir / "metrics.jsonl")) == 2
    assert "wandb has not taken everything after" in caplog.text
    hang.set()


def test_what_does_not_fit_is_left_out_there_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "QUEUED", 3)
    hang, noting = threading.Event(), Noting()
    tracker = Background("slow", after(hang, noting), clips=True)
    for i in range(10):
        tracker.scalars({}, i)
    hang.set()
    tracker.close()
    assert [entry[0] for entry in noting.got[:-1]] == [0, 1, 2]
    assert caplog.text.count("does not keep up") == 1


def test_clips_stay_here_where_the_recipe_says_so() -> None:
    noting = Noting()
    tracker = Background("no clips", lambda: noting, clips=False)
    tracker.clips([], 1)
    tracker.close()
    assert noting.got == ["closed"]


def test_a_tracker_whose_library_is_not_installed_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"trackers.0: wandb is not installed; pip install 'euphonium\[wandb\]'"):
        check_trackers(recipe(tmp_path, "wandb").metrics.trackers)


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    record(config, 0, 1)
    (events,) = (config.run_dir / "events").iterdir()
    data = events.read_bytes()
    assert data.count(b"policy/loss") == 2
    assert b"samples" in data


def resumed(place: Path, kind: str) -> tuple[RunConfig, str]:
    """A run that was recorded in two parts by a real tracker, and the tracker's id of it, the same in both."""
    pytest.importorskip(kind, reason=f"the extra {kind} is not installed")
    config = recipe(place, kind)
    record(config, 0, 1)
    first = (config.run_dir / TRACKED).read_text()
    record(config, 2)
    assert (config.run_dir / TRACKED).read_text() == first
    return config, json.loads(first)[f"0:{kind}"]


def test_mlflow_itself_goes_on_in_the_same_run(tmp_path: Path) -> None:
    config, run_id = resumed(tmp_path, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{config.run_dir / 'mlflow.db'}")
    losses = client.get_metric_history(run_id, "policy/loss")
    assert [(loss.step, loss.value) for loss in losses] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params["rollout.group_size"]) == ("FINISHED", "3")
    names = {artifact.path for artifact in client.list_artifacts(run_id, "clips/iteration_000002")}
    assert names == {"clips/iteration_000002/00.gif", "clips/iteration_000002/01.gif"}


def test_wandb_itself_goes_on_in_the_same_run(tmp_path: Path) -> None:
    config, run_id = resumed(tmp_path, "wandb")
    files = sorted((config.run_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2, "both parts have the id by which `wandb sync` joins them"
    # The library's own process writes the file, a moment after it said that it has finished.
    deadline = time.monotonic() + 30
    while b"policy/loss" not in files[1].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"policy/loss" in files[1].read_bytes()
    assert sorted((config.run_dir / "wandb").glob("offline-run-*/files/media/videos/*.gif"))


def test_swanlab_itself_goes_on_in_the_same_run(tmp_path: Path) -> None:
    config, run_id = resumed(tmp_path, "swanlab")
    files = sorted((config.run_dir / "swanlog").glob(f"run-*/run-{run_id}.swanlab"))
    assert len(files) == 2
    assert b"policy/loss" in files[1].read_bytes()
    assert sorted((config.run_dir / "swanlog").glob("run-*/media/*/*.gif"))

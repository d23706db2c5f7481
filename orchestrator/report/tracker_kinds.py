"""TensorBoard, Weights & Biases, MLflow and SwanLab as :class:`orchestrator.report.trackers.RunTracker`.

Accounts and keys are the libraries' own affair (environment, login files); no recipe holds them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from euphonium.config import TrackerConfig
from orchestrator.report.trackers import RunTracker, SavedClip, TrackedRun

# Longest value of a parameter that MLflow's servers take.
LONGEST_PARAMETER = 500
AXIS = "iteration"
LOGIN_S = 30


class TensorBoard(RunTracker):
    """Event files in the run's folder; what was recorded after the iterations done is hidden."""

    def __init__(self, folder: Path, iterations_done: int) -> None:
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(folder), purge_step=iterations_done + 1)

    @override
    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        for key, value in values.items():
            if key != AXIS:
                self._events.add_scalar(key, value, iteration)
        self._events.flush()

    @override
    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        self._events.add_image(name, pixels, iteration, dataformats="HWC")

    @override
    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        """They are in the contact sheet, which :meth:`picture` gets."""

    @override
    def close(self) -> None:
        self._events.close()


class WeightsAndBiases(RunTracker):
    """A W&B run, with the iteration as the axis, so that an iteration that is done again may come again."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        known = run.known or uuid.uuid4().hex[:8]
        # A question for a key, which nobody would answer, ends after a while.
        settings = {"console": "off", "silent": True, "login_timeout": LOGIN_S}
        self._run = wandb.init(
            project=config.project, name=run.name, id=known, resume="allow", config=dict(run.settings),
            dir=str(run.folder), mode="offline" if config.offline else "online", reinit="create_new",
            settings=wandb.Settings(**settings, **({"base_url": config.uri} if config.uri else {})),
        )  # fmt: skip
        run.remember(known)
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)

    @override
    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log({**values, AXIS: iteration})

    @override
    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        self._run.log({name: self._wandb.Image(Image.fromarray(pixels)), AXIS: iteration})

    @override
    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        shown = [self._wandb.Video(str(clip.file), caption=clip.caption, format="gif") for clip in saved]
        self._run.log({"clips": shown, AXIS: iteration})

    @override
    def close(self) -> None:
        self._run.finish()


class Mlflow(RunTracker):
    """An MLflow run; without an address, in ``mlflow.db`` and ``mlartifacts`` in the run's folder."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        import os

        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        local = config.offline or not (config.uri or os.environ.get("MLFLOW_TRACKING_URI"))
        uri = f"sqlite:///{run.folder / 'mlflow.db'}" if local else config.uri
        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = run.known
        if not self._run_id:
            found = self._client.get_experiment_by_name(config.project)
            artifacts = (run.folder / "mlartifacts").as_uri() if local else None
            experiment = found.experiment_id if found else self._client.create_experiment(config.project, artifacts)
            self._run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
            parameters = [Param(key, value[:LONGEST_PARAMETER]) for key, value in run.settings.items()]
            for begin in range(0, len(parameters), 100):
                self._client.log_batch(self._run_id, params=parameters[begin : begin + 100])
            run.remember(self._run_id)
        self._client.update_run(self._run_id, status="RUNNING")

    @override
    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, iteration) for key, value in values.items() if key != AXIS]
        self._client.log_batch(self._run_id, metrics=metrics)

    @override
    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        self._client.log_image(self._run_id, Image.fromarray(pixels), f"{name}/iteration_{iteration:06d}.png")

    @override
    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        for clip in saved:
            self._client.log_artifact(self._run_id, str(clip.file), f"clips/iteration_{iteration:06d}")

    @override
    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class SwanLab(RunTracker):
    """A SwanLab run; ``offline`` keeps it in the run's folder, for ``swanlab sync``."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        import swanlab

        self._swanlab = swanlab
        known = run.known or uuid.uuid4().hex[:21]
        self._run = swanlab.init(
            project=config.project, name=run.name, id=known, resume="allow", config=dict(run.settings),
            log_dir=str(run.folder / "swanlog"), mode="offline" if config.offline else "online",
            settings=swanlab.Settings(interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none")),
        )  # fmt: skip
        run.remember(known)

    @override
    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._swanlab.log({key: value for key, value in values.items() if key != AXIS}, step=iteration)

    @override
    def picture(self, name: str, pixels: Any, iteration: int) -> None:
        self._swanlab.log({name: self._swanlab.Image(pixels)}, step=iteration)

    @override
    def clips(self, saved: Sequence[SavedClip], iteration: int) -> None:
        shown = [self._swanlab.Video(str(clip.file), caption=clip.caption) for clip in saved]
        self._swanlab.log({"clips": shown}, step=iteration)

    @override
    def close(self) -> None:
        self._swanlab.finish()


BACKENDS: Mapping[str, Callable[[TrackerConfig, TrackedRun], RunTracker]] = {
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
    "swanlab": SwanLab,
}

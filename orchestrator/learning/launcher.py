"""Starts Ray Train runs on a thread of the driver, so that the run loop can poll them instead of waiting."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from euphonium.config import TrainingGroupConfig
from euphonium.errors import TrainingError


class Launch:
    """Blocking work on a thread of its own; an error is kept until :meth:`check` is called.

    Args:
        work: the work, for example ``fit`` of a :func:`torch_trainer`.
        name: name of the thread.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the work; returns at once."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the work has been started and is not done."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Blocks until the work has ended or the timeout is over; returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check(self, what: str) -> None:
        """Raises if the work has failed.

        Args:
            what: name of the work, for the error: "the learner group".

        Raises:
            TrainingError: it has; gives Ray Train's reason.
        """
        if self._error is not None:
            raise TrainingError(f"{what} is gone: {deepest_reason(self._error)}") from self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error


def torch_trainer(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    pool: TrainingGroupConfig,
    name: str,
    run_dir: Path,
) -> Any:
    """A Ray Train run of a function on every worker of a group.

    Args:
        loop: the function that each worker runs.
        settings: its argument.
        pool: the group's size, and the resources of each worker.
        name: name of the run.
        run_dir: folder under which Ray Train keeps its own files.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(pool.start_timeout_s)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from orchestrator.learning.backend import GpuGroup

    gpu = pool.num_gpus > 0
    # With GPUs, DeepSpeed's accelerator is named where the rank finds its device.
    environment = {"OMP_NUM_THREADS": str(pool.threads)} | ({} if gpu else {"DS_ACCELERATOR": "cpu"})
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=GpuGroup() if gpu else TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=pool.num_workers,
            use_gpu=gpu,
            resources_per_worker=pool.reserved,
            label_selector=dict(pool.labels) or None,
        ),
        run_config=RunConfig(
            # With a name that was used before, Ray Train would resume on its own; the orchestrator decides that.
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str((run_dir / "ray_train").resolve()),
            failure_config=FailureConfig(max_failures=pool.max_failures, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def deepest_reason(error: BaseException) -> str:
    """The last line of an error's text: the worker's own error, which Ray Train wraps in others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

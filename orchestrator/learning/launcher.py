"""Ray Train runs, and the thread of the driver that waits for one; its owner asks how it stands, and never waits."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from euphonium.config import LearnerPoolConfig
from euphonium.errors import TrainingError


class Launch:
    """Blocking work on a thread of its own, whose error waits for whoever asks.

    Args:
        work: to do, for example a run of :func:`torch_trainer`.
        name: of the thread.
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
        """Waits for the end of the work; whether it came in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check(self, what: str) -> None:
        """Raises what has ended the work.

        Args:
            what: works, for the error: "the learner group".

        Raises:
            TrainingError: with the reason that Ray Train gives.
        """
        if self._error is not None:
            raise TrainingError(f"{what} is gone: {deepest_reason(self._error)}") from self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error


def torch_trainer(
    loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], pool: LearnerPoolConfig, name: str, run_dir: Path
) -> Any:
    """A Ray Train run of a loop on every worker of a group.

    Args:
        loop: what each of them runs.
        settings: its argument.
        pool: the group's size, and what each worker takes.
        name: of the run.
        run_dir: under which Ray Train keeps its own files.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(pool.start_timeout_s)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    gpu = pool.num_gpus > 0
    environment = {"OMP_NUM_THREADS": str(pool.threads), "DS_ACCELERATOR": "cuda" if gpu else "cpu"}
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=pool.num_workers,
            use_gpu=gpu,
            resources_per_worker=pool.reserved,
            label_selector=dict(pool.labels) or None,
        ),
        run_config=RunConfig(
            # A name that was used before would make Ray Train resume on its own; resuming is ours to decide.
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str((run_dir / "ray_train").resolve()),
            failure_config=FailureConfig(max_failures=pool.max_failures, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def deepest_reason(error: BaseException) -> str:
    """The last line of the deepest cause: Ray Train wraps the worker's error in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

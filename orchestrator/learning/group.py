"""Learner groups: Ray Train runs; that of the policy on a thread of the driver, watched from the run loop."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from euphonium.config import LearnerPoolConfig, RunConfig
from euphonium.errors import TrainingError

log = logging.getLogger(__name__)


class LearnerGroup:
    """Runs ``learners.policy.train_loop`` on every worker until an order says stop."""

    def __init__(self, config: RunConfig, namespace: str, mailbox: str, store: str) -> None:
        self._config = config
        self._settings = {
            "config": config.model_dump(mode="json"), "namespace": namespace, "mailbox": mailbox, "store": store,
        }  # fmt: skip
        self._dismissed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="learner-group", daemon=True)

    def start(self) -> None:
        """Starts the group; returns at once."""
        self._thread.start()

    def check(self) -> None:
        """Raises if the group has ended.

        Raises:
            TrainingError: with the reason that Ray Train gives.
        """
        if self._dismissed:
            return
        if self._error is not None:
            raise TrainingError(f"the learner group is gone: {deepest_reason(self._error)}") from self._error
        if not self._thread.is_alive():
            raise TrainingError("the learner group has ended before the run did")

    def dismiss(self) -> None:
        """Notes that the group has done its last order and may end, while the run has still something to do."""
        self._dismissed = True

    def join(self, timeout_s: float) -> None:
        """Waits for the group to end, after an order that says stop."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("the learner group has not ended within %.0f s; going on without it", timeout_s)

    def _fit(self) -> None:
        config = self._config
        try:
            from learners.policy.train_loop import train_loop

            torch_trainer(train_loop, self._settings, config.pools.learner, config.name, config.run_dir).fit()
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

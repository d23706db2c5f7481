"""The learner group: a Ray Train run, which a thread of the driver waits for and the run loop polls."""

from __future__ import annotations

import logging

from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from orchestrator.learning.launcher import Launch, torch_trainer

log = logging.getLogger(__name__)


class LearnerGroup:
    """Runs ``learners.policy.train_loop`` on every worker, until an order says stop."""

    def __init__(self, config: RunConfig, namespace: str, mailbox: str, store: str) -> None:
        self._config = config
        self._settings = {
            "config": config.model_dump(mode="json"), "namespace": namespace, "mailbox": mailbox, "store": store,
        }  # fmt: skip
        self._dismissed = False
        self._launch = Launch(self._fit, "learner-group")

    def start(self) -> None:
        """Starts the group; returns at once."""
        self._launch.start()

    def check(self) -> None:
        """Raises if the group has ended, unless it was dismissed.

        Raises:
            TrainingError: it has; gives Ray Train's reason.
        """
        if self._dismissed:
            return
        self._launch.check("the learner group")
        if not self._launch.running:
            raise TrainingError("the learner group has ended before the run did")

    def dismiss(self) -> None:
        """Notes that the group has done its last order and may end, while the run goes on."""
        self._dismissed = True

    def join(self, timeout_s: float) -> None:
        """Blocks until the group has ended, after an order that says stop."""
        if not self._launch.join(timeout_s):
            log.warning("the learner group has not ended within %.0f s; going on without it", timeout_s)

    def _fit(self) -> None:
        from learners.policy.train_loop import train_loop

        config = self._config
        torch_trainer(train_loop, self._settings, config.pools.learner, config.name, config.run_dir).fit()

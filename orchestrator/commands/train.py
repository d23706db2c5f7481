"""``euphonium train``: from a checked recipe to the end of its run.

Nothing is moved or written before this process has the run's folder for itself, the recipe has been checked, and Ray
answers; heavy libraries are imported after the lock, so that a second start ends at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from euphonium.config import RunConfig
from euphonium.locks import writing_alone
from euphonium.role_logs import begin_logs, end_role_log, keep_role_log


def train_policy(config: RunConfig, say: Callable[[str], None], *, verbose: bool) -> None:
    """Trains a policy, or goes on with it.

    Args:
        config: the recipe, with absolute paths.
        say: prints a line.
        verbose: whether to print what the actors log, too.

    Raises:
        EuphoniumError: the run cannot start, or cannot go on.
    """
    with writing_alone([(config.run_dir, "output_dir")]):
        from orchestrator.commands.launch import is_complete, plan_start, preflight, prepare_run_dir
        from orchestrator.commands.planning import settle_run
        from orchestrator.pools.ray_session import connect_ray, reach_cluster
        from orchestrator.report.discovery import sign_off

        reach_cluster(os.environ.get("RAY_ADDRESS", ""))
        preflight(config)
        start = plan_start(config)
        checkpoint = start.checkpoint
        say(f"run {config.name}: {config.run_dir}")
        if checkpoint is not None:
            say(f"resuming from {checkpoint.folder} (iteration {checkpoint.state.iteration})")
            if is_complete(config, checkpoint):
                say(f"nothing to do: {config.iterations} iterations are done")
                sign_off(config)
                return
        config = settle_run(config, checkpoint)
        for field, note in config.planned.items():
            say(f"{field}: {note}")
        namespace = f"euphonium-{config.name}"
        connect_ray(namespace, verbose=verbose)
        import ray

        from orchestrator.lifecycle import execute
        from orchestrator.run import Run

        async def main() -> None:
            await execute(Run(config, namespace, checkpoint))

        try:
            prepare_run_dir(config, start)
            begin_logs(config.run_dir)
            keep_role_log(config.run_dir, "driver")
            asyncio.run(main())
        finally:
            ray.shutdown()
            end_role_log()

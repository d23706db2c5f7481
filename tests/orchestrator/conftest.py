"""The run loop around stub roles."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig
from tests.stubs.roles import stub_recipe


@pytest.fixture
def stub_config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        return stub_recipe(
            tmp_path, "stub", "checkpoint.every=3", "evaluation.every=100", "pools.start_timeout_s=300",
            "pools.rejoin_timeout_s=120", *overrides, prompts=7,
        )  # fmt: skip

    return make


@pytest.fixture
def execute(ray_cluster: None) -> Callable[..., None]:
    """Runs a run to its end, with another coroutine beside it, and takes its actors away."""

    def go(run: Any, beside: Callable[[Any], Any] | None = None) -> None:
        import ray

        from orchestrator.lifecycle import execute

        async def both() -> None:
            main = asyncio.ensure_future(execute(run))
            other = asyncio.ensure_future(beside(run)) if beside is not None else None
            await asyncio.wait_for(main, 240)
            if other is not None:
                await asyncio.wait_for(other, 10)

        try:
            asyncio.run(both())
        finally:
            # The thread of a run that failed must not join the next one's.
            run.learners.group.replaced = True
            for name in ray.util.list_named_actors():
                ray.kill(ray.get_actor(name))
            deadline = time.monotonic() + 30
            while ray.util.list_named_actors() and time.monotonic() < deadline:
                time.sleep(0.2)

    return go

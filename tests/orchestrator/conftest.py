"""The run loop around stub roles."""

import asyncio
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.config import RunConfig, load_config

STUBS = Path(__file__).parent.parent.parent / "benchmarks" / "stub_roles.py"


@pytest.fixture(scope="session")
def stubs() -> Any:
    """benchmarks/stub_roles.py; pickled by value, since workers cannot import it."""
    import ray

    spec = importlib.util.spec_from_file_location("stub_roles", STUBS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stub_roles"] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


@pytest.fixture
def stub_config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        (tmp_path / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(7)))
        (tmp_path / "held_out.txt").write_text("held out 1\nheld out 2")
        actor = {"num_cpus": 0.1}
        recipe = {
            "name": "stub", "output_dir": str(tmp_path / "runs"), "iterations": 8,
            "model": {"path": "none", "frames": 9, "height": 32, "width": 32, "max_prompt_tokens": 16},
            "prompts": {"train": str(tmp_path / "train.txt"), "evaluation": str(tmp_path / "held_out.txt")},
            "sampler": {"law": "dance", "eta": 0.5, "num_steps": 4},
            "rollout": {"prompts_per_iteration": 3, "group_size": 2},
            "rewards": {
                "outcome": [{"name": "icon", "type": "sprite_icon"}, {"name": "motion", "type": "sprite_motion"}],
            },
            "optimizer": {"learning_rate": 1e-4},
            "evaluation": {"every": 100, "clips": 0, "prompts": 2},
            "pools": {
                "rollout": {"num_actors": 2, **actor}, "orm": actor, "learner": {"num_workers": 1, **actor},
                "start_timeout_s": 300, "rejoin_timeout_s": 120,
            },
            "checkpoint": {"every": 3},
            "metrics": {"tensorboard": False, "prometheus_port": None},
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return load_config(tmp_path / "recipe.yaml", overrides)

    return make


@pytest.fixture
def execute(ray_cluster: None) -> Callable[..., None]:
    """Runs a run to its end, with another coroutine beside it, and takes its actors away."""

    def go(run: Any, beside: Callable[[Any], Any] | None = None) -> None:
        import ray

        async def both() -> None:
            main = asyncio.ensure_future(run.execute())
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

"""The refresh of the process reward model between real Ray actors."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.errors import LostActorError
from euphonium.wire.records import GroupPayload
from euphonium.wire.roles import PrmRefresher
from learners.rewards.refresh import PrmRefreshActor
from orchestrator.learning.process_reward import FOLDER, RefreshHandle
from orchestrator.pools.actor_pool import ActorPool
from orchestrator.pools.supervisor import PoolSpec
from reward_servers.prm import PrmActor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def group(seed: int) -> tuple[Any, Any, np.ndarray]:
    """References to final latents and transitions of a group, and its outcome totals."""
    import ray

    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((4, 16, 5, 4, 4)).astype(np.float32)
    empty = np.zeros((4, 0), dtype=np.float32)
    payload = GroupPayload(
        states=empty, next_states=empty, steps=empty.astype(np.int64), log_probs=empty, gradients=None,
        conditioning={
            "encoder_hidden_states": rng.standard_normal((1, 7, 64)).astype(np.float32),
            "encoder_attention_mask": np.ones((1, 7), dtype=np.float32),
            "pooled_projections": rng.standard_normal((1, 64)).astype(np.float32),
        },
    )  # fmt: skip
    return ray.put(latents), ray.put(payload), latents[:, 3].mean(axis=(1, 2, 3))


def refresh_pool(config: RunConfig) -> ActorPool[PrmRefresher]:
    """The pool of one in which a run has its refresh."""
    share = config.pools.refresh_pool
    spec = PoolSpec(
        role="prm_refresh", config=share, interface=PrmRefresher, factory=lambda i: (PrmRefreshActor, (config,)),
        start_timeout_s=60.0, rejoin_timeout_s=60.0,
    )  # fmt: skip
    return ActorPool(spec, [].append)


def wait_for(actor: Any) -> None:
    """Returns when a restarting actor answers again."""
    # A kill is not at once: the process that is being ended may still answer.
    time.sleep(2.0)
    import ray

    deadline = time.monotonic() + 120
    while True:
        try:
            ray.get(actor.ready.remote(), timeout=60)
            return
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_servers_follow_refreshes_restarts_and_rewinds(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    import ray

    items = ["every=2", "updates=2", "pairs_per_update=4", "learning_rate=1e-2", "buffer_groups=3"]
    config = make_config(*(f"rewards.process.refresh.{item}" for item in items))
    actors = [
        ray.remote(PrmActor).options(num_cpus=0.1, max_restarts=1, max_task_retries=0).remote(i, config) for i in (0, 1)
    ]
    latents, payload, _ = group(9)
    x, conditioning = ray.get(latents), ray.get(payload).conditioning

    def scores() -> list[np.ndarray]:
        return [ray.get(a.reward_and_gradient.remote(x, 0.4, conditioning, False))[0] for a in actors]

    async def run() -> None:
        pool = refresh_pool(config)
        pool.start()
        await asyncio.wait_for(pool.wait_started(), 120)
        (member,) = pool.roster.members
        handle = RefreshHandle(config, member.handle)
        await handle.restore(None, actors)
        start = scores()
        first = await handle.step(1, [group(0), group(1)], actors, None)
        assert set(first) == {"time/prm_refresh_s"}
        assert np.array_equal(scores()[0], start[0])
        second = await handle.step(2, [group(2), group(3)], actors, tmp_path)
        # Three groups of four samples are kept.
        assert second["process/refresh_pairs"] == 3 * 6
        refreshed = scores()
        assert abs(refreshed[0] - start[0]).max() > 1e-3
        assert np.array_equal(refreshed[0], refreshed[1])
        # A server that was restarted has the old weights, until the next iteration.
        ray.kill(actors[1], no_restart=False)
        wait_for(actors[1])
        assert np.array_equal(scores()[1], start[1])
        await handle.step(3, [group(4)], actors, None)
        assert np.array_equal(scores()[1], refreshed[1])
        await handle.step(4, [group(5)], actors, None)
        later = scores()
        assert abs(later[0] - refreshed[0]).max() > 1e-4
        # Back to the checkpoint, and to the start where there is none.
        assert (tmp_path / FOLDER / "prm.json").is_file()
        await handle.restore(tmp_path, actors)
        assert np.array_equal(scores()[0], refreshed[0])
        await handle.step(3, [group(4)], actors, None)
        await handle.step(4, [group(5)], actors, None)
        np.testing.assert_allclose(scores()[0], later[0], atol=1e-6)
        await handle.restore(None, actors)
        assert np.array_equal(scores()[0], start[0])
        # The refresh itself is restarted: it has forgotten its samples, and says so until it has a checkpoint.
        pool.lose(member, kill=True)
        while member.joins < 2:
            await asyncio.sleep(0.1)
        with pytest.raises(LostActorError, match="has forgotten its samples"):
            await handle.step(3, [group(4)], actors, None)
        await handle.restore(tmp_path, actors)
        assert np.array_equal(scores()[0], refreshed[0])
        await handle.step(3, [group(4)], actors, None)
        pool.stop()
        ray.kill(member.handle)

    asyncio.run(run())
    for actor in actors:
        ray.kill(actor)

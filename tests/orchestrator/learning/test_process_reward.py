"""The refresh of the process reward model between real Ray actors."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from euphonium.config import RunConfig
from euphonium.wire.records import GroupPayload
from euphonium.wire.roles import PrmRefresher, PrmServer, start_actor
from learners.rewards.refresh import PrmRefreshActor
from orchestrator.learning import process_reward
from orchestrator.learning.process_reward import FOLDER, ProcessRewardRefresh
from orchestrator.pools.run_pools import ActorFactories, RunPools
from orchestrator.report.tracking import Progress
from orchestrator.state.interruption import Interruption
from reward_servers.prm import PrmActor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def group(seed: int) -> tuple[Any, Any, np.ndarray]:
    """References to final latents and transitions of a group, and its outcome totals."""
    import ray

    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((4, 16, 5, 4, 4)).astype(np.float32)
    empty = np.zeros((4, 0), dtype=np.float32)
    payload = GroupPayload(
        states=empty, rows=empty.astype(np.int64),
        next_rows=empty.astype(np.int64), steps=empty.astype(np.int64), log_probs=empty, gradients=None,
        conditioning={
            "encoder_hidden_states": rng.standard_normal((1, 7, 64)).astype(np.float32),
            "encoder_attention_mask": np.ones((1, 7), dtype=np.float32),
            "pooled_projections": rng.standard_normal((1, 64)).astype(np.float32),
        },
    )  # fmt: skip
    return ray.put(latents), ray.put(payload), latents[:, 3].mean(axis=(1, 2, 3))


class Watched:
    """The refresh as a run has it, with the pools that it needs, and what it says."""

    def __init__(self, config: RunConfig, checkpoint: Path | None = None) -> None:
        factories = ActorFactories(
            prm=lambda i, options: start_actor(PrmServer, PrmActor, options, i, config),
            prm_refresh=lambda i, options: start_actor(PrmRefresher, PrmRefreshActor, options, config),
            orm=nobody,
            rollout=nobody,
        )
        self.pools = RunPools(config, factories, Progress(1, 0))
        self.interruption = Interruption(lambda: None)
        self.checkpoint = checkpoint
        self.said: list[str] = []
        self.refresh = ProcessRewardRefresh(
            config, self.pools, self.interruption, lambda: self.checkpoint, self.said.append
        )

    async def start(self) -> None:
        for pool in (self.pools.prm, self.pools.prm_refresh):
            assert pool is not None
            pool.start()
            await asyncio.wait_for(pool.wait_started(), 120)

    async def stop(self) -> None:
        import ray

        self.pools.stop()
        for pool in (self.pools.prm, self.pools.prm_refresh):
            assert pool is not None
            for member in pool.roster.members:
                ray.kill(member.handle)
        while any(name.startswith("prm") for name in ray.util.list_named_actors()):
            await asyncio.sleep(0.1)


def nobody(index: int, options: Any) -> Any:
    raise AssertionError("no such actor is started")


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


REFRESH = ["every=2", "updates=2", "pairs_per_update=4", "learning_rate=1e-2", "buffer_groups=3"]


def refreshing(make_config: Callable[..., RunConfig], servers: int, *changes: str) -> RunConfig:
    items = [f"rewards.process.refresh.{item}" for item in [*REFRESH, *changes]]
    return make_config(f"pools.prm.num_actors={servers}", *items)


def scores(pools: RunPools) -> list[np.ndarray]:
    """What the PRM servers say of one state."""
    import ray

    assert pools.prm is not None
    latents, payload, _ = group(9)
    x, conditioning = ray.get(latents), ray.get(payload).conditioning
    handles = pools.prm.reachable_handles
    return [ray.get(h.reward_and_gradient.remote(x, 0.4, conditioning, False))[0] for h in handles]


def test_servers_follow_refreshes_restarts_and_rewinds(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    import ray

    async def run() -> None:
        watched = Watched(refreshing(make_config, 2))
        await watched.start()
        pools, refresh = watched.pools, watched.refresh
        assert pools.prm is not None
        assert pools.prm_refresh is not None
        await refresh.restore()
        start = scores(pools)
        first = await refresh.step(1, [group(0), group(1)], None)
        assert set(first) == {"time/prm_refresh_s"}
        assert np.array_equal(scores(pools)[0], start[0])
        second = await refresh.step(2, [group(2), group(3)], tmp_path)
        # Three groups of four samples are kept.
        assert second["process/refresh_pairs"] == 3 * 6
        refreshed = scores(pools)
        assert abs(refreshed[0] - start[0]).max() > 1e-3
        assert np.array_equal(refreshed[0], refreshed[1])
        # A server that was restarted has the old weights, until the next iteration.
        server = pools.prm.reachable_handles[1]
        ray.kill(server, no_restart=False)
        await asyncio.to_thread(wait_for, server)
        assert np.array_equal(scores(pools)[1], start[1])
        await refresh.step(3, [group(4)], None)
        assert np.array_equal(scores(pools)[1], refreshed[1])
        await refresh.step(4, [group(5)], None)
        later = scores(pools)
        assert abs(later[0] - refreshed[0]).max() > 1e-4
        # Back to the checkpoint, and to the start where there is none.
        assert (tmp_path / FOLDER / "prm.json").is_file()
        watched.checkpoint = tmp_path
        await refresh.restore()
        assert np.array_equal(scores(pools)[0], refreshed[0])
        await refresh.step(3, [group(4)], None)
        await refresh.step(4, [group(5)], None)
        np.testing.assert_allclose(scores(pools)[0], later[0], atol=1e-6)
        watched.checkpoint = None
        await refresh.restore()
        assert np.array_equal(scores(pools)[0], start[0])
        # The refresh itself is lost: it takes up the checkpoint and goes on, and people are told.
        watched.checkpoint = tmp_path
        (member,) = pools.prm_refresh.roster.members
        pools.prm_refresh.lose(member, kill=True)
        while member.joins < 2:
            await asyncio.sleep(0.1)
        await refresh.step(3, [group(4)], None)
        assert any("goes on from the last checkpoint, without the samples since" in line for line in watched.said)
        assert np.array_equal(scores(pools)[0], refreshed[0])
        await refresh.step(4, [group(5)], None)
        np.testing.assert_allclose(scores(pools)[0], later[0], atol=1e-6)
        await watched.stop()

    asyncio.run(run())


def test_a_stop_does_not_wait_for_a_refresh_which_is_made_up_for_later(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refreshing(make_config, 1, "updates=30")
    monkeypatch.setattr(process_reward, "PIECE_S", 0.01)

    async def run() -> None:
        stopped = Watched(config)
        await stopped.start()
        await stopped.refresh.restore()
        start = scores(stopped.pools)[0]
        await stopped.refresh.step(2, [group(0), group(1)], None)
        wanted = scores(stopped.pools)[0]
        assert abs(wanted - start).max() > 1e-3
        # The same once more, which is stopped.
        await stopped.refresh.restore()
        assert np.array_equal(scores(stopped.pools)[0], start)
        stepping = asyncio.ensure_future(stopped.refresh.step(2, [group(0), group(1)], None))
        pool = stopped.pools.prm_refresh
        assert pool is not None
        while not await pool.reachable_handles[0].__ray_call__.remote(lambda actor: actor._training is not None):
            await asyncio.sleep(0.01)
        stopped.interruption.request()
        assert set(await stepping) == {"time/prm_refresh_s"}
        assert np.array_equal(scores(stopped.pools)[0], start)
        # As a run does that stops between two checkpoints.
        await stopped.refresh.save(tmp_path)
        await stopped.stop()

        resumed = Watched(config, checkpoint=tmp_path)
        await resumed.start()
        await resumed.refresh.restore()
        assert any("process reward model refreshed on" in line for line in resumed.said)
        np.testing.assert_allclose(scores(resumed.pools)[0], wanted, atol=1e-6)
        await resumed.stop()

    asyncio.run(asyncio.wait_for(run(), 400))

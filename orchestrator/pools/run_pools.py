"""The pools of a run: which there are, who sends requests to whom, and how they start, change and end together.

What they are asked to do is in rollout_service.py. The learner group is none of them: Ray Train holds it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import override

from euphonium.config import PoolConfig, RunConfig
from euphonium.wire.records import PoolSnapshot
from euphonium.wire.roles import Balancer, OrmServer, PoolMember, PrmRefresher, PrmServer, RolloutServer
from orchestrator.pools.actor_pool import ActorPool
from orchestrator.pools.start_up import wait_started
from orchestrator.pools.supervisor import ActorFactory, PoolSpec
from orchestrator.report.tracking import Progress

if TYPE_CHECKING:
    from ray.actor import ActorProxy

_M = TypeVar("_M", bound="PoolMember")


@dataclass(frozen=True, kw_only=True)
class ActorFactories:
    """What starts the actors of a run, by role; a role without one is not in the run.

    Without a load balancer, each client of reward servers goes by its own requests.
    """

    rollout: ActorFactory[RolloutServer]
    orm: ActorFactory[OrmServer]
    prm: ActorFactory[PrmServer] | None = None
    prm_refresh: ActorFactory[PrmRefresher] | None = None
    balancer: Callable[[], ActorProxy[Balancer]] | None = None


class RunPools(Mapping[str, ActorPool[Any]]):
    """All pools of a run by role. The constructor starts nothing.

    Attributes:
        prm: pool of process-reward servers, or None without a process reward.
        prm_refresh: the actor that refreshes the process reward model, a pool of one, or None without a refresh.
        orm: pool of outcome-reward servers.
        rollout: pool of rollout actors.
        balancer: the load balancer of the reward servers, once the pools are started.
    """

    prm: ActorPool[PrmServer] | None
    prm_refresh: ActorPool[PrmRefresher] | None
    orm: ActorPool[OrmServer]
    rollout: ActorPool[RolloutServer]

    def __init__(self, config: RunConfig, factories: ActorFactories, progress: Progress) -> None:
        """Pools without members.

        Args:
            config: of the run.
            factories: what starts their actors.
            progress: prints who joins and who is lost.
        """
        self._config, self._progress = config, progress
        self._start_balancer = factories.balancer
        self.balancer: ActorProxy[Balancer] | None = None
        pools = config.pools
        self.rollout = self._pool("rollout", pools.rollout, factories.rollout)
        # A rollout keeps the servers' names for as long as its group takes.
        clients = [self.rollout]
        self.orm = self._pool("orm", pools.orm, factories.orm, clients)
        # PRM servers are asked in every step of every sample: of equally busy ones clients take one on their own node.
        self.prm = self._pool("prm", pools.prm, factories.prm, clients, spread=True) if factories.prm else None
        self.prm_refresh = (
            self._pool("prm_refresh", pools.refresh_pool, factories.prm_refresh) if factories.prm_refresh else None
        )

    def _pool(
        self,
        role: str,
        size: PoolConfig,
        factory: ActorFactory[_M],
        clients: Sequence[ActorPool[Any]] = (),
        *,
        spread: bool = False,
    ) -> ActorPool[_M]:
        spec = PoolSpec(
            role=role,
            config=size,
            factory=factory,
            start_timeout_s=self._config.pools.start_timeout_s,
            rejoin_timeout_s=self._config.pools.rejoin_timeout_s,
            spread=spread,
        )
        return ActorPool(spec, lambda text: self._progress.say(text), clients)

    def _all(self) -> dict[str, ActorPool[Any]]:
        pools: dict[str, ActorPool[Any] | None] = {
            "prm": self.prm, "prm_refresh": self.prm_refresh, "orm": self.orm, "rollout": self.rollout,
        }  # fmt: skip
        return {role: pool for role, pool in pools.items() if pool is not None}

    @override
    def __getitem__(self, role: str) -> ActorPool[Any]:
        return self._all()[role]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    @override
    def __len__(self) -> int:
        return len(self._all())

    # --- start, change, end -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts all actors, from within the event loop.

        The largest shares of GPUs come first: Ray fills up one GPU after another, and what is small finds room in gaps.
        """
        if self._start_balancer is not None:
            self.balancer = self._start_balancer()
        for pool in sorted(self.values(), key=lambda pool: -pool.spec.config.num_gpus):
            pool.start()

    async def wait_started(self) -> None:
        """Waits until all actors are present, and says who is missing.

        Raises:
            ResourcesError: actors could not be placed within ``pools.start_timeout_s``.
            TrainingError: an actor failed to start.
        """
        await wait_started(list(self.values()), self._config.pools.start_timeout_s, self._progress.say)

    def stop(self) -> None:
        """Ends all looking after actors, which stay as they are."""
        for pool in self.values():
            pool.stop()

    def resize(self, role: str, size: int) -> None:
        """Grows or shrinks a pool, if the run has it; the refresh of the process reward model is one actor always."""
        pool = self.get(role)
        if pool is None or pool is self.prm_refresh:
            return
        self._progress.say(f"{role} pool {pool.roster.wanted} -> {size}")
        pool.resize(size)

    # --- what is known of them ----------------------------------------------------------------------------------

    def weight_receivers(self) -> tuple[str, ...]:
        """Rollout actors that take part in the next broadcast of weights; none without ``collective`` transport."""
        if self._config.pools.learner.weight_transport != "collective":
            return ()
        return tuple(member.name for member in self.rollout.roster.present)

    def load(self) -> dict[str, float]:
        """Busy fractions and sizes of the pools that can change their size, as metrics."""
        record = {}
        for role, pool in self.items():
            busy = pool.busy_fraction()
            if pool is not self.prm_refresh:
                record[f"busy/{role}"] = busy
                record[f"pool/{role}"] = float(len(pool.roster.present))
        return record

    def status(self) -> dict[str, PoolSnapshot]:
        """What ``euphonium status`` shows of the pools."""
        return {role: pool.status() for role, pool in self.items()}

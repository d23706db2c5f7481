"""The pools of a run, and what it asks of their actors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from euphonium.config import RunConfig
from euphonium.errors import LateError, LostActorError
from euphonium.wire.clients import RewardClient
from euphonium.wire.deadlines import awaited
from euphonium.wire.records import (
    Array,
    GroupInfo,
    GroupPayload,
    GroupTask,
    OrmAnswer,
    Videos,
    WeightKind,
)
from euphonium.wire.roles import RolloutContext, ServerRef
from orchestrator.pools.pools import ActorPool, Make, Member
from orchestrator.position import Position
from orchestrator.report.tracking import Progress

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

    from euphonium.wire.roles import OrmServer, PoolMember, PrmServer, RolloutServer

_T = TypeVar("_T")
_M = TypeVar("_M", bound="PoolMember")


class Crew:
    """See the module.

    Attributes:
        rollout: pool of rollout actors.
        orm: pool of outcome-reward servers.
        prm: pool of process-reward servers, or None without a process reward.
    """

    rollout: ActorPool[RolloutServer]
    orm: ActorPool[OrmServer]
    prm: ActorPool[PrmServer] | None

    def __init__(self, config: RunConfig, position: Position, progress: Progress) -> None:
        self._config = config
        self._position = position
        self._progress = progress
        self._judges = RewardClient("orm", lambda: references(self.orm), config.rewards)
        self._judging: set[asyncio.Future[Any]] = set()
        self._started = False

    @property
    def pools(self) -> dict[str, ActorPool[Any]]:
        """All pools that have been made, by role."""
        if not self._started:
            return {}
        prm = {} if self.prm is None else {"prm": self.prm}
        return {**prm, "orm": self.orm, "rollout": self.rollout}

    # --- size and load ------------------------------------------------------------------------------------------

    def start(self, makes: Mapping[str, Make]) -> None:
        """Makes all pools; nobody has joined yet."""
        from euphonium.wire.roles import OrmServer, PrmServer, RolloutServer

        pools = self._config.pools
        common: dict[str, Any] = {
            "start_timeout_s": pools.start_timeout_s, "rejoin_timeout_s": pools.rejoin_timeout_s,
            "say": self._progress.say,
        }  # fmt: skip
        self.prm = ActorPool("prm", pools.prm, PrmServer, makes["prm"], **common) if "prm" in makes else None
        self.orm = ActorPool("orm", pools.orm, OrmServer, makes["orm"], **common)
        self.rollout = ActorPool("rollout", pools.rollout, RolloutServer, makes["rollout"], **common)
        self._started = True

    def resize(self, role: str, size: int) -> None:
        """Grows or shrinks a pool, if the run has it."""
        pool = self.pools.get(role)
        if pool is None:
            return
        self._progress.say(f"{role} pool {pool.wanted} -> {size}")
        # A rollout keeps the servers' names for as long as its group takes.
        drained = {"rollout": None, "prm": self.rollout.quiet, "orm": self._judged}
        pool.resize(size, drained=drained[role])

    def receivers(self) -> tuple[str, ...]:
        """Rollout actors that take part in the next broadcast of weights; none without ``collective`` transport."""
        if self._config.pools.learner.weight_transport != "collective":
            return ()
        return tuple(member.name for member in self.rollout.present)

    def load(self) -> dict[str, float]:
        """Busy fractions and sizes of the pools, as metrics."""
        record = {}
        for role, pool in self.pools.items():
            record[f"busy/{role}"] = pool.busy_fraction()
            record[f"pool/{role}"] = float(len(pool.present))
        return record

    # --- work ---------------------------------------------------------------------------------------------------

    async def draw(self, task: GroupTask) -> tuple[GroupInfo, ObjectRef[Array], ObjectRef[GroupPayload]]:
        """Has a rollout actor draw a group.

        Returns:
            What is to be known of it, and references to its final latents and its transitions.

        Raises:
            LostActorError: the actor died or hangs.
            WeightsMissingError: the weight store does not have the weights.
        """
        from euphonium.wire.roles import generate_group

        if self.prm is not None:
            await self.prm.manned()
        async with self.rollout.exclusive(priority=task.group_id) as member:
            # The driver makes the call, so it owns the three results: they outlive the actor.
            info_ref, latents, payload = generate_group(member.handle, task, self._context("policy"))
            info = await self._rollout_answer(member, info_ref, f"group {task.group_id} from the rollout pool")
        return info, latents, payload

    async def samples(self, prompts: Sequence[str], seeds: Sequence[int], kind: WeightKind) -> Array:
        """Has a rollout actor draw evaluation samples, before all groups.

        Args:
            prompts: texts.
            seeds: of their noise.
            kind: of weights.

        Returns:
            Latents ``[len(prompts), *latent]``.

        Raises:
            LostActorError: the actor died or hangs.
            WeightsMissingError: the weight store does not have the weights.
        """
        async with self.rollout.exclusive(priority=-1) as member:
            ref = member.handle.evaluate.remote(prompts, seeds, self._context(kind))
            return await self._rollout_answer(member, ref, "evaluation samples")

    async def scores(
        self, latents: Array | ObjectRef[Array], prompts: Sequence[str], timeout_s: float
    ) -> tuple[OrmAnswer, float]:
        """Outcome rewards of latents, or of a reference to them, and the seconds that they took.

        Raises:
            RewardError: no server answered with finite numbers.
        """
        return await self._ask_judge(lambda server: server.score.remote(latents, prompts, timeout_s), timeout_s)

    async def videos(self, latents: Array, timeout_s: float) -> Videos:
        """Decoded latents, uint8 ``[batch, frames, height, width, 3]``.

        Raises:
            RewardError: no server answered.
        """
        return await self._ask_judge(lambda server: server.videos.remote(latents), timeout_s)

    def _context(self, kind: WeightKind) -> RolloutContext:
        """What rollout actors work with from now on."""
        return RolloutContext(
            version=self._position.state.iteration,
            history=self._position.history,
            kind=kind,
            prm_servers=references(self.prm) if self.prm is not None else (),
            orm_servers=references(self.orm),
        )

    async def _rollout_answer(self, member: Member[RolloutServer], ref: Awaitable[_T], what: str) -> _T:
        """Awaits a rollout actor's answer; one that dies, or hangs and is killed, gets no work until it is back."""
        try:
            return await awaited(ref, self._config.rollout.deadline_s, what)
        except LateError:
            self.rollout.lose(member, kill=True)
            raise
        except LostActorError:
            self.rollout.lose(member)
            raise

    async def _ask_judge(self, send: Callable[[ActorProxy[OrmServer]], ObjectRef[_T]], timeout_s: float) -> _T:
        """An ORM server's answer."""
        asking = asyncio.ensure_future(self._judges.ask(send, timeout_s))
        self._judging.add(asking)
        asking.add_done_callback(self._judging.discard)
        return await asking

    async def _judged(self) -> None:
        """Waits until nobody may still ask an ORM server that has left the pool."""
        await self.rollout.quiet()
        await asyncio.gather(*self._judging, return_exceptions=True)


def references(pool: ActorPool[_M]) -> tuple[ServerRef[_M], ...]:
    """A pool's servers as their clients get them."""
    return tuple(ServerRef(member.handle, member.node) for member in pool.reachable)

"""The work that a run gives to its pools: drawing groups and evaluation samples, scoring and decoding them.

A rollout actor works for one caller at a time; callers wait for one in the order of their groups, evaluations first. A
rollout whose actor is lost is given to another one; if the weight store has lost the weights, they are published again
first. Requests to ORM servers have retries of their own (euphonium/wire/clients.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from euphonium.config import RunConfig
from euphonium.errors import LateError, LostActorError, TrainingError, WeightsMissingError
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
from euphonium.wire.roles import GroupRefs, OrmServer, RolloutContext, RolloutServer, generate_group, merge_group
from orchestrator.pools.roster import Member
from orchestrator.pools.run_pools import RunPools
from orchestrator.state.position import Position

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

    # A description of a group or of a part of one, and references to its final latents and its transitions.
    DrawnGroup = tuple[GroupInfo, ObjectRef[Array], ObjectRef[GroupPayload]]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LONGEST_PAUSE_S = 15.0


class RolloutService:
    """Draws and scores samples with the run's pools; retries what is lost with an actor."""

    def __init__(
        self, config: RunConfig, pools: RunPools, position: Position, republish: Callable[[], Awaitable[None]]
    ) -> None:
        """Creates the service; no actor is called.

        Args:
            config: configuration of the run; ``rewards.attempts`` holds for rollouts and evaluation samples too.
            pools: the run's pools.
            position: where the run stands, which says what weights to use.
            republish: has the learner group publish missing weights again.
        """
        self._config = config
        self._pools = pools
        self._position = position
        self._republish = republish
        self._orm: RewardClient[OrmServer] = RewardClient(
            "orm", lambda: pools.orm.references, config.rewards, balancer=lambda: pools.balancer
        )

    @property
    def rollout_actors(self) -> int:
        """Number of rollout actors that take work now."""
        return len(self._pools.rollout.roster.present)

    @property
    def orm_servers(self) -> int:
        """Number of ORM servers that answer now."""
        return len(self._pools.orm.roster.present)

    async def draw(self, task: GroupTask, parts: Sequence[tuple[int, int]] = ()) -> DrawnGroup:
        """Has a rollout actor draw a group, or several of them its parts, which one of them puts together.

        A part whose actor is lost is drawn again by another one; the others stay.

        Args:
            task: the group.
            parts: half-open ranges of its samples; none for a group that is drawn whole.

        Returns:
            A description of the group, and references to its final latents and its transitions.

        Raises:
            LostActorError: the actor of the last attempt died or hung.
            WeightsMissingError: the weight store did not have the weights in the last attempt.
            RewardError: no server returned the process rewards.
            TrainingError: a pool has no actor left.
        """
        if not parts:
            return await self._drawn(task)
        drawing = [self._drawn(dataclasses.replace(task, members=members)) for members in parts]
        drawn = []
        # Also after an error all are waited for: their actors are busy until then.
        for part in await asyncio.gather(*drawing, return_exceptions=True):
            if isinstance(part, BaseException):
                raise part
            drawn.append(part)
        return await self._attempts(lambda: self._merge(task, drawn), f"putting {task} together")

    async def samples(self, prompts: Sequence[str], seeds: Sequence[int], kind: WeightKind) -> Array:
        """Has a rollout actor draw evaluation samples; they go before all groups.

        Args:
            prompts: one text a sample.
            seeds: seed of each sample's noise.
            kind: whether to draw with the policy's weights or their moving average.

        Returns:
            Latents ``[len(prompts), *latent]``.

        Raises:
            LostActorError: the actor of the last attempt died or hung.
            WeightsMissingError: the weight store did not have the weights in the last attempt.
            TrainingError: the rollout pool has no actor left.
        """
        return await self._attempts(lambda: self._samples(prompts, seeds, kind), "evaluation samples")

    async def sleep(self) -> None:
        """Has all rollout actors leave their GPUs until their next work, if the recipe wants it; waits until they have.

        One that is lost meanwhile comes back asleep.
        """
        if not self._config.pools.rollout.sleep:
            return

        async def sleep(member: Member[ActorProxy[RolloutServer]]) -> None:
            with contextlib.suppress(LateError, LostActorError):
                await self._rollout_answer(member, member.handle.sleep.remote(), f"{member.name} going to sleep")

        await asyncio.gather(*map(sleep, self._pools.rollout.roster.present))

    async def scores(
        self, latents: Array | ObjectRef[Array], prompts: Sequence[str], timeout_s: float, optional: Sequence[str]
    ) -> tuple[OrmAnswer, float]:
        """Outcome rewards of latents, by name, and the seconds that they took; optional ones that fail are missing.

        Raises:
            RewardError: no server answered, or a reward is not finite.
        """
        return await self._ask_orm(lambda server: server.score.remote(latents, prompts, timeout_s, optional), timeout_s)

    async def videos(self, latents: Array, timeout_s: float) -> Videos:
        """Decoded latents, uint8 ``[batch, frames, height, width, 3]``.

        Raises:
            RewardError: no server answered.
        """
        return await self._ask_orm(lambda server: server.videos.remote(latents), timeout_s)

    async def _attempts(self, work: Callable[[], Awaitable[_T]], what: str) -> _T:
        """Does work that may lose its actor or its weights, in up to ``rewards.attempts`` attempts."""
        last: TrainingError | None = None
        for attempt in range(self._config.rewards.attempts):
            if attempt:
                log.warning("%s: trying again: %s", what, last)
                await asyncio.sleep(min(2.0**attempt, LONGEST_PAUSE_S))
            try:
                return await work()
            except LostActorError as error:
                last = error
            except WeightsMissingError as error:
                last = error
                await self._republish()
        assert last is not None
        raise last

    async def _drawn(self, task: GroupTask) -> DrawnGroup:
        return await self._attempts(lambda: self._draw(task), f"{task} ({task.prompt})")

    async def _draw(self, task: GroupTask) -> DrawnGroup:
        if self._pools.prm is not None:
            await self._pools.prm.roster.wait_present()
        async with self._pools.rollout.exclusive(priority=task.group_id) as member:
            refs = generate_group(member.handle, task, self._context("policy"))
            return await self._described(member, refs, f"{task} from the rollout pool")

    async def _merge(self, task: GroupTask, parts: Sequence[DrawnGroup]) -> DrawnGroup:
        infos, latents, payloads = zip(*parts, strict=True)
        async with self._pools.rollout.exclusive(priority=task.group_id) as member:
            refs = merge_group(member.handle, infos, latents, payloads)
            return await self._described(member, refs, f"{task}, put together by the rollout pool")

    async def _described(self, member: Member[ActorProxy[RolloutServer]], refs: GroupRefs, what: str) -> DrawnGroup:
        # The driver made the call, so it owns the three results: they outlive the actor.
        info, latents, payload = refs
        return await self._rollout_answer(member, info, what), latents, payload

    async def _samples(self, prompts: Sequence[str], seeds: Sequence[int], kind: WeightKind) -> Array:
        async with self._pools.rollout.exclusive(priority=-1) as member:
            ref = member.handle.evaluate.remote(prompts, seeds, self._context(kind))
            return await self._rollout_answer(member, ref, "evaluation samples")

    def _context(self, kind: WeightKind) -> RolloutContext:
        """The context of a task that is sent now."""
        prm = self._pools.prm
        return RolloutContext(
            version=self._position.iteration,
            history=self._position.history,
            kind=kind,
            prm_servers=prm.references if prm is not None else (),
            orm_servers=self._pools.orm.references,
            balancer=self._pools.balancer,
        )

    async def _rollout_answer(self, member: Member[ActorProxy[RolloutServer]], ref: Awaitable[_T], what: str) -> _T:
        """Awaits a rollout actor's answer. One that hangs is killed; a lost one gets no work until it is back."""
        try:
            return await awaited(ref, self._config.rollout.deadline_s, what)
        except LateError:
            self._pools.rollout.lose(member, kill=True)
            raise
        except LostActorError:
            self._pools.rollout.lose(member)
            raise

    async def _ask_orm(self, send: Callable[[ActorProxy[OrmServer]], ObjectRef[_T]], timeout_s: float) -> _T:
        """An ORM server's answer."""
        async with self._pools.orm.roster.shared():
            return await self._orm.ask(send, timeout_s)

"""Algorithm 1 of Euphonium, on a cluster: guided exploration, then optimisation, one iteration as one transaction.

    prompts -> rollout actors <-> PRM servers            r_p(x_k) and its gradient, asked for while v(x_k) is computed
                    | latents (reference)   | transitions (reference)
                    v                       v
               ORM servers -> credit -> trajectory buffer -> learner mailbox <- leases - learner group (ZeRO-3)
                                                                                               |
               rollout actors <------------ weight store <------------- publishes -------------+

Two loops meet in the trajectory buffer. What each waits for, and what unblocks it:

* drawing (groups/batches.py) waits for room in the buffer and for an idle rollout actor; trained iterations make room,
  finished groups free actors. It runs ahead of training by ``rollout.max_staleness`` versions at most.
* training (here) waits for the groups of its iteration, with whose first ones an on-policy learner group begins
  meanwhile (learning/stream.py), then for the learner group's report; both waits have deadlines and end when the
  learner group fails. A learner group that died is restarted by Ray Train from the last checkpoint, and
  :meth:`Run.recovery` takes the run back there.

Everything runs on one event loop in the driver. Rollout actors fetch new weights themselves, between groups; every
order says which policy version it takes at least.
"""

from __future__ import annotations

from orchestrator.groups.credit import assign_credit
from orchestrator.run import Run
from orchestrator.state.position import Turn, next_turn


async def train(run: Run) -> None:
    """Trains to the end.

    Raises:
        StopRequestedError: a stop was requested; the run stands between two iterations.
        TrainingError: the run cannot go on.
    """
    while not run.finished:
        async with run.recovery():
            if not run.journal.begun:
                run.journal.start(await run.evaluate(0))
            await run.resize_learners()
            await iterate(run, next_turn(run.config, run.position))


async def iterate(run: Run, turn: Turn) -> None:
    """One iteration: lines 3 to 22 of Algorithm 1.

    Raises:
        LearnerRestartedError: the learner group went back to a checkpoint; nothing of this turn counts.
        StopRequestedError: a stop was requested; either nothing of this turn counts or all of it.
    """
    with run.journal.turn(turn) as entry:
        # Phase 1, guided exploration, lines 4-13: trajectories under the gradient of the process reward, and rewards.
        batch = await run.interruptible(run.stream.next())
        # Line 14: advantages of every action, Eq. 16.
        groups, statistics = assign_credit(run.config, batch)
        run.journal.drawn(entry, turn, batch, statistics, run.batches.buffer.held())

        # Phase 2, optimisation, lines 16-22: clipped updates; the new weights are the behaviour policy of what is drawn
        # next. From here to the commit nothing may cut the transaction in two.
        checkpoint = run.checkpoints.begin(turn.number) if turn.saves else None
        entry.updated(await run.update(turn, batch, groups, checkpoint), batch)
        # Beyond the paper: the process reward model keeps up with the policy.
        entry.numbers |= await run.process_reward.follow(turn.number, batch, checkpoint)
        await run.commit(turn, batch, entry, checkpoint)

        if turn.evaluates:
            entry.numbers |= await run.evaluate(turn.number)
    if not turn.last:
        run.interruption.raise_if_requested()

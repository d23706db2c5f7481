"""Start and end of a run: the roles come up, the algorithm runs, a checkpoint or the trained policy is left.

Waits for: the places of the learner group on GPUs, before any actor is started; all actors (``pools.start_timeout_s``)
and the learner group (``pools.learner.start_timeout_s``). All may be given up when a stop is requested.
"""

from __future__ import annotations

import time

from euphonium.wire.records import Publish
from orchestrator.algorithm import train
from orchestrator.deployment.pool_table import total_demand
from orchestrator.learning.link import LearnerRestartedError
from orchestrator.learning.placement import placement_groups, told_meanwhile, wait_placed
from orchestrator.pools.ray_session import name_is_free
from orchestrator.pools.resources import beyond_the_cluster
from orchestrator.report.discovery import sign_off
from orchestrator.run import JOIN_TIMEOUT_S, Run
from orchestrator.state.interruption import StopRequestedError


async def execute(run: Run) -> None:
    """Starts all roles, trains to the end or to a stop, and leaves a checkpoint.

    Raises:
        EuphoniumError: the run cannot start, or cannot go on.
    """
    run.interruption.install()
    began = time.monotonic()
    try:
        await _start_roles(run)
        run.journal.say(f"all roles are up after {time.monotonic() - began:.0f} s")
        if run.finished:
            await _evaluate_at_last(run)
        await train(run)
        await _finish(run)
        sign_off(run.config)
    except StopRequestedError:
        await _save_and_stop(run)
        sign_off(run.config)
    finally:
        run.desk.close()
        run.pools.stop()
        await run.batches.forget()
        run.journal.close()
        run.interruption.uninstall()


async def _start_roles(run: Run) -> None:
    await run.interruptible(name_is_free(run.config.name))
    run.learners.open()
    run.desk.open()
    await run.learners.resume_from(*run.checkpoints.resume_point)
    run.journal.enter("starting roles")
    if lacking := beyond_the_cluster(total_demand(run.config)):
        run.journal.say(f"not all roles have room in the cluster, and the run waits for more nodes: {lacking}")
    run.desk.poll()
    # Ranks need room for all of them at once; actors take what is left, piece by piece.
    others = placement_groups()
    run.learners.start(run.learner_group())
    await run.interruptible(wait_placed(run.config.pools.learner, others, run.journal.say))
    run.pools.start()
    await run.interruptible(run.pools.wait_started())
    joined = run.learners.joined(*run.checkpoints.resume_point)
    await run.interruptible(told_meanwhile(joined, run.config.pools.learner, run.journal.say))
    await run.interruptible(run.process_reward.restore())
    if run.journal.tracker.endpoint is not None:
        run.journal.say(f"metrics at {run.journal.tracker.endpoint.address}")


async def _evaluate_at_last(run: Run) -> None:
    """Makes up for the last evaluation of a run that was cut short in it."""
    done = run.position.iteration
    await run.learners.carry_out(Publish(version=done, average=run.config.optimizer.averages, stop=True))
    run.learners.dismiss()
    run.journal.complete_last(await run.evaluate(done))


async def _finish(run: Run) -> None:
    """Waits for the last checkpoint, and exports the trained policy."""
    await run.checkpoints.finished()
    run.learners.join(JOIN_TIMEOUT_S)
    run.export()
    run.journal.summary()


async def _save_and_stop(run: Run) -> None:
    """Checkpoints where the run stands, after a signal."""
    done = run.position.iteration
    await run.batches.forget()
    if not run.learners.usable:
        run.journal.say("stopped before training began; nothing to save")
        return
    await run.checkpoints.finished()
    newest = run.checkpoints.newest
    if newest is None or newest.state.iteration != done:
        run.journal.say(f"stopping: writing a checkpoint of iteration {done}")
        try:
            await run.save(stop=True)
        except LearnerRestartedError:
            run.journal.say("the learner group died over it: the run goes on from the checkpoint before")
    run.journal.say(
        f"stopped after iteration {done}; go on with: euphonium train {run.config.run_dir}/config.resolved.yaml "
        "resume=auto"
    )

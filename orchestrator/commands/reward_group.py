"""Runs the training of a reward model, and the preparation of its data, in this process or on a group of learners."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from euphonium.config import OrmConfig, PrmConfig, TrainingGroupConfig
from euphonium.wire.deadlines import get
from learners.rewards.training import PROGRESS_FILE
from orchestrator.learning.launcher import Launch, torch_trainer

PrintLine = Callable[[str], None]

SAY_EVERY_S = 15.0
POLL_S = 0.5

_T = TypeVar("_T")
_P = ParamSpec("_P")


@contextmanager
def cluster(config: PrmConfig | OrmConfig) -> Iterator[None]:
    """Joins or starts a Ray cluster if the recipe has a learner group, and disconnects at the end."""
    if config.learner is None:
        yield
        return
    import ray

    from orchestrator.pools.ray_session import connect_ray

    if ray.is_initialized():
        yield
        return
    connect_ray(f"euphonium-{config.name}", verbose=False)
    try:
        yield
    finally:
        ray.shutdown()


def map_shares(
    work: Callable[Concatenate[Iterable[int], _P], _T],
    pool: TrainingGroupConfig | None,
    count: int,
    say: PrintLine,
    what: str,
    *arguments: _P.args,
    **named: _P.kwargs,
) -> list[_T]:
    """Splits numbered work into one Ray task for each learner; without a group, does it all in this process.

    Args:
        work: called with a share of the numbers below ``count``, and the arguments.
        pool: the learner group, whose resources the tasks use, or None.
        count: number of work items.
        say: prints progress.
        what: name of the work, for progress and errors.
        arguments: further arguments of ``work``.
        named: keyword arguments of ``work``.

    Returns:
        Result of each share, in the order of their numbers.

    Raises:
        EuphoniumError: whatever the work raised.
    """
    if pool is None:
        return [work(_with_progress(count, say, what), *arguments, **named)]
    import ray

    shares = min(pool.num_workers, count)
    bounds = [count * i // shares for i in range(shares + 1)]
    from euphonium.wire.roles import remote_task

    shared = [ray.put(argument) for argument in arguments]
    run_share = remote_task(_task, pool.ray_options)
    refs = [run_share(work, pool.threads, range(low, high), named, *shared) for low, high in itertools.pairwise(bounds)]
    began, waiting = time.monotonic(), list(refs)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=SAY_EVERY_S)
        if waiting:
            say(f"{what}: {shares - len(waiting)}/{shares} shares done, {time.monotonic() - began:.0f} s (each needs "
                f"{pool.num_cpus:g} CPU, {pool.num_gpus:g} GPU)")  # fmt: skip
    return list(get(refs, None, what))


def _task(work: Callable[..., _T], threads: int, share: range, named: dict[str, Any], *arguments: Any) -> _T:
    import torch

    torch.set_num_threads(threads)
    return work(share, *arguments, **named)


def _with_progress(count: int, say: PrintLine, what: str) -> Iterator[int]:
    began = said = time.monotonic()
    for number in range(count):
        yield number
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"{what}: {number + 1}/{count}, {said - began:.0f} s")


def run_training(kind: Literal["prm", "orm"], config: PrmConfig | OrmConfig, say: PrintLine) -> None:
    """Trains to the end, from the newest checkpoint if there is one, and writes ``result.json`` and the model.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        TrainingError: the loss is not finite, or the group failed more often than ``learner.max_failures``.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if config.learner is None:
        _train_here(config, say)
    else:
        _train_on_group(kind, config, config.learner, say)


def _train_here(config: PrmConfig | OrmConfig, say: PrintLine) -> None:
    from learners.rewards.worker import progress_file, train_here

    write = progress_file(config.run_dir)

    def report(record: Mapping[str, object]) -> None:
        write(record)
        say(progress_line(record))

    train_here(config, report)


def _train_on_group(
    kind: Literal["prm", "orm"], config: PrmConfig | OrmConfig, pool: TrainingGroupConfig, say: PrintLine
) -> None:
    from learners.rewards.worker import reward_train_loop

    settings = {"kind": kind, "config": config.model_dump(mode="json")}
    launch = Launch(
        lambda: torch_trainer(reward_train_loop, settings, pool, config.name, config.run_dir).fit(), "reward-group"
    )
    progress = config.run_dir / PROGRESS_FILE
    progress.touch()
    with progress.open() as stream:
        stream.seek(0, os.SEEK_END)
        launch.start()
        ended = False
        while not ended:
            ended = launch.join(POLL_S)
            for line in stream:
                say(progress_line(json.loads(line)))
    launch.check("the reward model's learner group")


def progress_line(record: Mapping[str, Any]) -> str:
    """A record of progress as a readable line."""
    if "resumed" in record:
        return f"going on from the checkpoint of update {record['resumed']}"
    left = (record["updates"] - record["update"]) / max(record["updates_per_s"], 1e-9)
    line = (
        f"update {record['update']}/{record['updates']}, loss {record['loss']:.4f}, "
        f"{record['updates_per_s']:.2f} updates/s, {left / 60:.1f} min left"
    )
    accuracy = record.get("accuracy")
    if isinstance(accuracy, list):
        line += ", accuracy by tenth " + " ".join(f"{a:.2f}" for a in accuracy)
    elif accuracy is not None:
        line += f", accuracy {accuracy:.3f}"
    return line

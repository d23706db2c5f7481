"""Where a reward model's training runs: in this process, or on a group of learners under Ray Train."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from euphonium.config import LearnerPoolConfig, OrmConfig, PrmConfig
from euphonium.errors import TrainingError
from euphonium.wire.deadlines import get
from learners.rewards.training import PROGRESS_FILE
from orchestrator.learning.group import deepest_reason, torch_trainer

Say = Callable[[str], None]

SAY_EVERY_S = 15.0
POLL_S = 0.5

_C = TypeVar("_C", PrmConfig, OrmConfig)
_T = TypeVar("_T")
_P = ParamSpec("_P")


def absolute(config: _C) -> _C:
    """The same recipe with its files by absolute path: tasks and workers do not share the driver's directory."""
    changes: dict[str, Any] = {"output_dir": config.output_dir.resolve(), "target": config.target.resolve()}
    if Path(config.model.path).exists():
        changes["model"] = config.model.model_copy(update={"path": str(Path(config.model.path).resolve())})
    if config.preferences is not None:
        files = {"train": config.preferences.train, "held_out": config.preferences.held_out}
        found = {name: file.resolve() for name, file in files.items() if file is not None}
        changes["preferences"] = config.preferences.model_copy(update=found)
    return config.model_copy(update=changes)


@contextmanager
def cluster(config: PrmConfig | OrmConfig) -> Iterator[None]:
    """Joins or starts a Ray cluster if the recipe has a group, and leaves it at the end."""
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
    pool: LearnerPoolConfig | None,
    count: int,
    say: Say,
    what: str,
    *arguments: _P.args,
    **named: _P.kwargs,
) -> list[_T]:
    """Does numbered work, each learner's share in a task on its resources; in this process without a group.

    Args:
        work: called with numbers below ``count``, and the arguments.
        pool: of learners, or None.
        count: of numbers.
        say: takes progress lines.
        what: the work, for them.
        arguments: of ``work``.
        named: of ``work``.

    Returns:
        Results of the shares, in the order of their numbers.

    Raises:
        EuphoniumError: whatever the work raised.
    """
    if pool is None:
        return [work(_told(count, say, what), *arguments, **named)]
    import ray

    shares = min(pool.num_workers, count)
    bounds = [count * i // shares for i in range(shares + 1)]
    task = ray.remote(_task).options(**pool.ray_options)
    shared = [ray.put(argument) for argument in arguments]
    refs = [
        task.remote(work, pool.threads, range(low, high), named, *shared) for low, high in itertools.pairwise(bounds)
    ]
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


def _told(count: int, say: Say, what: str) -> Iterator[int]:
    began = said = time.monotonic()
    for number in range(count):
        yield number
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"{what}: {number + 1}/{count}, {said - began:.0f} s")


def run_training(kind: Literal["prm", "orm"], config: PrmConfig | OrmConfig, say: Say) -> None:
    """Trains to the end, from the newest checkpoint if there is one; ``result.json`` and the model are then written.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        TrainingError: the loss is not finite, or the group failed more often than ``learner.max_failures``.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if config.learner is None:
        from learners.rewards.worker import progress_file, train_here

        write = progress_file(config.run_dir)

        def report(record: dict[str, Any]) -> None:
            write(record)
            say(progress_line(record))

        train_here(config, report)
        return
    progress = config.run_dir / PROGRESS_FILE
    progress.touch()
    errors: list[BaseException] = []
    thread = threading.Thread(target=_fit, args=(kind, config, errors), name="reward-group", daemon=True)
    with progress.open() as stream:
        stream.seek(0, os.SEEK_END)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            for line in stream:
                say(progress_line(json.loads(line)))
    if errors:
        raise TrainingError(f"the reward model's learner group is gone: {deepest_reason(errors[0])}") from errors[0]


def progress_line(record: dict[str, Any]) -> str:
    """A record of progress, for people."""
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


def _fit(kind: str, config: PrmConfig | OrmConfig, errors: list[BaseException]) -> None:
    try:
        from learners.rewards.worker import reward_train_loop

        assert config.learner is not None
        settings = {"kind": kind, "config": config.model_dump(mode="json")}
        torch_trainer(reward_train_loop, settings, config.learner, config.name, config.run_dir).fit()
    except BaseException as error:
        errors.append(error)

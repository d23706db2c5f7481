"""Ranks of a process group, each a process of its own, for tests of what several ranks do together.

They are forked from a process that has imported the libraries of a learner: a rank's imports take as long as the whole
training of most tests. With GPUs, which do not outlive a fork, every rank imports them itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

LIBRARIES = ("ray.train", "deepspeed", "diffusers.models.autoencoders", "diffusers.models.transformers")
HOST = "127.0.0.1"


def run_ranks(count: int, program: Path, *arguments: object, timeout_s: float) -> str:
    """Runs a program in some ranks, which find one another as under torchrun, and waits for all.

    Args:
        count: number of ranks.
        program: a file of Python.
        arguments: of the program.
        timeout_s: seconds after which ranks that still run are ended.

    Returns:
        What they printed.

    Raises:
        AssertionError: a rank failed, or time was up; the others are ended. Carries what they printed.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    # The ranks are its clients, so that nobody has to guess a free port.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "output.txt"
        argv = [str(program), *map(str, arguments)]
        ranks = [
            context.Process(target=_run, args=(argv, dict(os.environ) | _address(r, count, store.port), printed))
            for r in range(count)
        ]
        for rank in ranks:
            rank.start()
        try:
            why = _wait(ranks, timeout_s)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        output = printed.read_text()
    assert not why, f"{program.name}: {why}\n{output[-8000:]}"
    return output


def _address(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _wait(ranks: list[BaseProcess], timeout_s: float) -> str:
    """Waits until all ranks have ended well, or one has not; why, or nothing."""
    deadline = time.monotonic() + timeout_s
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            return f"{len(running)} of {len(ranks)} ranks still run after {timeout_s:g} s"
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[call-overload]
            rank.join()
            if rank.exitcode:
                return f"{rank.name} ended with {rank.exitcode}"
    return ""


def _run(argv: list[str], environment: dict[str, str], printed: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with printed.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()

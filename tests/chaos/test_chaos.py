"""Everything dies once: the run recovers with the numbers of an unbroken one, or ends soon and says why."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from euphonium.files import MANIFEST
from orchestrator.state.checkpoints import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
BOUND_S = 400.0


def test_a_learner_rank_killed_in_an_update_repeats_and_skips_nothing(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable
) -> None:
    job = start(str(recipe()))
    job.wait_for("iteration 3/6")
    victim = job.one("RayTrainWorker")
    wait_until(victim, "busy")
    victim.kill()
    killed = time.monotonic()
    # Iteration 4 is under way, so that iteration 3 is repeated; or that has just passed, and its checkpoint is there.
    assert job.wait_for("going on from iteration").rpartition(" ")[2] in ("2", "4")
    assert time.monotonic() - killed < BOUND_S
    assert job.finish() == 0, job.output
    same_numbers()


def test_a_run_killed_at_once_goes_on_from_its_last_checkpoint(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable, tmp_path: Path
) -> None:
    path = recipe()
    job = start(str(path))
    job.wait_for("iteration 3/6")
    # Inside the writing of the checkpoint of iteration 4: its folder is there, under its temporary name.
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(folder.glob("step_000004*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    job.popen.send_signal(signal.SIGKILL)
    assert job.finish() == -signal.SIGKILL
    again = start(str(path))
    again.wait_for("resuming from")
    assert again.finish() == 0, again.output
    same_numbers()
    assert not list(folder.glob("*.tmp-*"))


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_any_instant_goes_on(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable, seed: int
) -> None:
    path = recipe("checkpoint.every=1")
    rng = random.Random(seed)
    job = start(str(path))
    job.wait_for(f"iteration {rng.randrange(5)}/6")
    time.sleep(rng.uniform(0, 4))
    job.popen.send_signal(signal.SIGKILL)
    job.finish()
    again = start(str(path))
    assert again.finish() == 0, again.output
    same_numbers()


ROLES = (
    ("RolloutActor", "rollout-"), ("PrmActor", "prm-"), ("OrmActor", "orm-"),
    ("LearnerMailbox", "learner-mailbox"), ("WeightStore", "weight-store"), ("ControlDesk", "control"),
    ("LoadBalancer", "load-balancer"),
)  # fmt: skip


def wait_until(process: psutil.Process, moment: str) -> None:
    """Returns in the middle of a computation (``busy``), or when there was none for a while (``idle``)."""
    # CPU time is counted in hundredths of a second; among more processes than cores a quarter of one is much.
    window, least, most = {"busy": (0.1, 0.025, math.inf), "idle": (0.3, 0.0, 0.01)}[moment]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = process.cpu_times().user
        time.sleep(window)
        if least <= process.cpu_times().user - before <= most:
            return
    raise AssertionError(f"{process} is never {moment}")


@pytest.mark.parametrize(
    ("titles", "moment"),
    [(titles, "idle") for titles in ROLES] + [(titles, "busy") for titles in ROLES[:3]],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_killed_role_is_replaced(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable, titles: tuple[str, ...], moment: str
) -> None:
    job = start(str(recipe("rewards.deadline_s=60")))
    job.wait_for("iteration 3/6")
    victim = job.one(*titles)
    wait_until(victim, moment)
    victim.kill()
    killed = time.monotonic()
    assert job.finish() == 0, job.output
    assert time.monotonic() - killed < BOUND_S
    same_numbers()


@pytest.mark.parametrize("loses", ["half of its actors", "all of its actors"])
def test_a_pool_that_loses_a_node(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable, nodes: Any, loses: str
) -> None:
    """Half of a pool does the work of all; without any of it the run waits for another node."""
    node = {"num_cpus": 2, "resources": {"worker": 1 if "half" in loses else 2}, "labels": {"pool": "reward"}}
    victim = nodes.add_node(**node)
    if "half" in loses:
        nodes.add_node(**node)
    home = [f"pools.{role}.resources={{home: 1}}" for role in ("orm", "learner")]
    away = ["pools.rollout.resources={worker: 1}", "pools.prm.labels={pool: reward}", "pools.prm.num_actors=2"]
    path = recipe(*home, *away, "rewards.deadline_s=60", "rewards.attempts=20")
    job = start(str(path), address=nodes.address)
    job.wait_for("iteration 2/6")
    nodes.remove_node(victim, allow_graceful=False)
    removed = time.monotonic()
    job.wait_for("is lost")
    if "all" in loses:
        job.wait_for("0 of 2 rollout actors at work")
        nodes.add_node(**node)
        job.wait_for("has joined; 2 of 2 rollout")
    assert job.finish() == 0, job.output
    assert time.monotonic() - removed < BOUND_S
    same_numbers()


CHURN = """
import collections, sys, time
import numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = collections.deque(maxlen=40)
while True:
    held.append(ray.put(np.zeros(5 << 20, dtype=np.uint8)))
    if len(held) == held.maxlen:
        print("full", flush=True)
        time.sleep(0.05)
"""


def test_an_object_store_that_is_always_full_slows_a_run_down_and_no_more(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable, nodes: Any
) -> None:
    """Somebody else keeps twice the object store's size in it, and replaces it all the time."""
    churn = subprocess.Popen([sys.executable, "-c", CHURN, nodes.address], stdout=subprocess.PIPE, text=True)
    try:
        assert churn.stdout is not None
        assert churn.stdout.readline() == "full\n"
        threading.Thread(target=churn.stdout.read, daemon=True).start()
        job = start(str(recipe()), address=nodes.address)
        assert job.finish(BOUND_S) == 0, job.output
        assert churn.poll() is None
    finally:
        churn.kill()
        churn.wait()
    same_numbers()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Puts a file system of so many bytes where the run keeps its checkpoints; again, to change its size."""
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = False

    def of_size(nbytes: int) -> Path:
        nonlocal mounted
        options = f"size={nbytes}" + (",remount" if mounted else "")
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
        mounted = True
        return folder

    yield of_size
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_what_to_do_and_loses_nothing(
    start: Callable,
    recipe: Callable[..., Path],
    same_numbers: Callable,
    small_disk: Callable[[int], Path],
    checkpoint_bytes: int,
) -> None:
    folder = small_disk(int(1.5 * checkpoint_bytes))
    path = recipe("checkpoint.every=1")
    job = start(str(path))
    assert job.finish(BOUND_S) == 5, job.output
    assert job.lines[-1].startswith("error:")
    assert "checkpoint of iteration 2 could not be written" in job.lines[-1]
    assert "make room" in job.lines[-1]
    small_disk(10 * checkpoint_bytes)
    again = start(str(path))
    again.wait_for(f"resuming from {folder}/step_000001")
    assert again.finish() == 0, again.output
    same_numbers()


def test_a_slow_reward_is_waited_for(start: Callable, recipe: Callable[..., Path], same_numbers: Callable) -> None:
    """The servers stand still four fifths of the time."""
    job = start(str(recipe("rewards.deadline_s=60")))
    job.wait_for("iteration 1/6")
    while job.popen.poll() is None:
        for server in job.processes("OrmActor", "orm-", "PrmActor", "prm-"):
            with contextlib.suppress(psutil.NoSuchProcess):
                server.suspend()
                time.sleep(0.4)
                server.resume()
        time.sleep(0.1)
    assert job.finish() == 0, job.output
    assert "is lost" not in job.output
    same_numbers()


def test_a_run_is_stopped_in_the_middle_of_anything(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable
) -> None:
    path = recipe("checkpoint.every=100")
    for seed in range(3):
        job = start(str(path))
        job.wait_for("/6 |")
        time.sleep(random.Random(seed).uniform(0, 2))
        job.popen.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        assert job.finish() == 0, job.output
        assert time.monotonic() - signalled < 120
    last = start(str(path))
    assert last.finish() == 0, last.output
    same_numbers()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable, tmp_path: Path, damage: str
) -> None:
    path = recipe()
    job = start(str(path))
    job.wait_for("iteration 5/6")
    job.popen.send_signal(signal.SIGKILL)
    job.finish()
    newest = CheckpointStore(tmp_path / "runs" / "tiny" / "checkpoints", 2).newest()
    assert newest is not None
    assert newest.state.iteration == 4
    (shard,) = sorted(newest.folder.rglob("shard_00001*"))
    content = bytearray(shard.read_bytes())
    content = content[: len(content) // 2] if damage == "truncated" else content
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)
    again = start(str(path))
    again.wait_for("(iteration 2)")
    assert "step_000004" in again.output
    assert again.finish() == 0, again.output
    same_numbers()


def test_rewards_that_are_no_numbers_end_the_run_with_an_error(
    start: Callable, recipe: Callable[..., Path], tiny_prm: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_prm.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (weights,) = broken.glob("*.safetensors")
    tensors = {name: torch.full_like(t, float("nan")) for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    job = start(str(recipe(f"rewards.process.path={broken}", "rewards.attempts=2")))
    assert job.finish(BOUND_S) == 5, job.output
    assert job.lines[-1].startswith("error:")
    assert "not finite" in job.output


def test_a_reward_that_hangs_is_asked_again_or_ends_the_run(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable
) -> None:
    path = recipe("rewards.deadline_s=8", "rewards.attempts=3")
    job = start(str(path))
    job.wait_for("iteration 3/6")
    server = job.one("OrmActor", "orm-")
    server.suspend()
    time.sleep(12)
    server.resume()
    job.wait_for("iteration 4/6")
    server.suspend()
    began = time.monotonic()
    assert job.finish(BOUND_S) == 5, job.output
    assert time.monotonic() - began < BOUND_S
    assert "the orm pool did not answer in 3 attempts" in job.lines[-1]
    assert "raise rewards.deadline_s" in job.lines[-1]


def test_a_rollout_actor_that_hangs_is_started_anew(
    start: Callable, recipe: Callable[..., Path], same_numbers: Callable
) -> None:
    job = start(str(recipe("rollout.deadline_s=30")))
    job.wait_for("iteration 3/6")
    job.one("RolloutActor", "rollout-").suspend()
    assert job.finish() == 0, job.output
    assert "is lost" in job.output
    same_numbers()


def test_the_learner_group_and_all_pools_change_size(
    start: Callable, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    job = start(str(recipe("iterations=10000", "checkpoint.every=1000", "rollout.max_staleness=1")))
    job.wait_for("2/10000 |")

    def ask(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments], env={**os.environ, "RAY_ADDRESS": job.cluster},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "rollout 2 -> 3" in ask("scale", "tiny", "rollout=3", "prm=2", "learner=1")
    awaited = {"the learner group has 1 ranks", "prm-1 has joined", "rollout-2 has joined"}
    while awaited:
        line = job.wait_for(" has ")
        awaited = {text for text in awaited if text not in line}
    for _ in range(2):
        job.wait_for("/10000 |")
    status = ask("status")
    assert status.startswith("tiny: ")
    assert "rollout 3 3" in " ".join(status.split()), status
    job.popen.send_signal(signal.SIGTERM)
    assert job.finish() == 0, job.output
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    assert (last["pool/rollout"], last["pool/prm"], last["pool/learner"]) == (3, 2, 1)
    assert last["policy/ratio_deviation"] < 1e-4
    newest = CheckpointStore(tmp_path / "runs" / "tiny" / "checkpoints", 2).newest()
    assert newest is not None
    assert newest.state.world_size == 1
    assert (newest.folder / MANIFEST).is_file()

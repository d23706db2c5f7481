"""Whole runs through the command line, on a real Ray cluster of this machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from euphonium.config import RunConfig, dump_config
from orchestrator.state.checkpoints import CheckpointStore
from tests.process import ROOT, Process, forget_last_evaluation

pytestmark = pytest.mark.ray
MARK = "EUPHONIUM_TEST"
PROMPT = "a red heart moving down on a black background"


@pytest.fixture
def recipe(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Path]:
    def write(*overrides: str) -> Path:
        config = tiny_recipe_file(tmp_path, *overrides)
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_config(config))
        return path

    return write


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Everything that a test starts inherits it; other people's clusters on this machine do not have it.
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    yield
    deadline = time.monotonic() + 30
    while (left := ray_processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, f"processes left behind: {left}"


def ray_processes(title: str = "ray::") -> list[psutil.Process]:
    """Processes of this test with a title."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and words and words[0].startswith(title):
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == os.environ[MARK]:
                    found.append(process)
    return found


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


REQUIRED = {
    "iteration", "policy_version", "reward/icon/mean", "reward/icon/std", "reward/motion/mean",
    "advantage/zero_std_groups", "policy/ratio_deviation", "policy/clip_fraction", "policy/grad_norm",
    "time/rollout_s", "time/update_s", "time/weight_sync_s",
}  # fmt: skip


def test_a_run_is_stopped_resumed_exported_and_used(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("iterations=500", "evaluation.every=3", "checkpoint.every=1000", "optimizer.ema_decay=0.5")
    run = tmp_path / "runs" / "tiny"

    first = Process("train", str(path))
    address = first.wait_for("metrics at ").split()[-1]
    first.wait_for("iteration   4/500")
    scraped = scrape(address)
    assert 'euphonium_iteration{run="tiny"} 4.0' in scraped
    assert 'euphonium_reward_mean{reward="icon",run="tiny"}' in scraped
    first.popen.send_signal(signal.SIGTERM)
    assert first.finish() == 0, first.output
    assert "resume=auto" in first.output
    checkpoint = CheckpointStore(run / "checkpoints", 2).newest()
    assert checkpoint is not None
    done = checkpoint.state.iteration
    assert done >= 4
    assert [r["iteration"] for r in records(run)] == list(range(done + 1))

    second = Process("train", str(path), f"iterations={done + 2}")
    second.wait_for(f"resuming from {checkpoint.folder}")
    assert second.finish() == 0, second.output
    everything = records(run)
    assert [r["iteration"] for r in everything] == list(range(done + 3))
    for record in everything[1:]:
        assert set(record) >= REQUIRED
        assert record["policy/ratio_deviation"] < 1e-5
        assert record["policy_version"] == record["iteration"]
    for record in everything:
        evaluated = record["iteration"] % 3 == 0 or record["iteration"] == done + 2
        assert ("eval/total/mean" in record) == evaluated
    for name in ("config.resolved.yaml", "events", "samples/before_after.png", "samples/before_after/00.gif"):
        assert (run / name).exists(), name
    check_role_logs(run)
    # What was trained is what is exported: the average moved away from where it began.
    exported = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    averaged = load_file(newest_folder(run) / "average.safetensors")
    assert all(torch.equal(exported[n], averaged[n]) for n in averaged)

    third = Process("train", str(path), f"iterations={done + 2}")
    assert third.finish() == 0, third.output
    assert "nothing to do" in third.output

    check_export_in_clean_process(run, tmp_path)
    check_generate_and_evaluate(run, tmp_path)


@pytest.mark.slow
def test_a_run_that_was_ended_in_its_last_evaluation_makes_up_for_it(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Stubs do so in tests/orchestrator/test_run.py; here the learners publish for it, and leave."""
    path, run = recipe("iterations=2", "optimizer.ema_decay=0.5"), tmp_path / "runs" / "tiny"
    first = Process("train", str(path))
    assert first.finish() == 0, first.output
    everything = records(run)
    before = (run / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    forget_last_evaluation(run)
    second = Process("train", str(path))
    assert second.finish() == 0, second.output
    again = records(run)
    assert [r["iteration"] for r in again] == [r["iteration"] for r in everything]
    assert again[-1]["eval/total/mean"] == pytest.approx(everything[-1]["eval/total/mean"], abs=1e-6)
    assert (run / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def check_role_logs(run: Path) -> None:
    """Every process of a role has a log, and says in every line who it is and which iteration the run is at."""
    logs = {file.stem: file.read_text().splitlines() for file in (run / "logs").glob("*.log")}
    pools = {"rollout-0", "rollout-1", "prm-0", "orm-0", "learner-0", "learner-1"}
    assert set(logs) == pools | {"driver", "learner-mailbox", "weight-store", "control", "load-balancer"}
    for role, lines in logs.items():
        begun = [line.split() for line in lines if re.match(r"\d{4}-", line)]
        assert begun
        assert all(words[2] == role and words[4].startswith("iteration=") for words in begun)
    # The iteration is that of the run, which goes on while a rank waits for its receipt.
    done = re.compile(r" iteration=[23] .*carried out: Update of version 2$")
    assert any(done.search(line) for line in logs["learner-0"])
    assert any("euphonium.said: iteration   1/500" in line for line in logs["driver"])
    # So does that of an actor which everybody calls and which computes nothing.
    assert any(re.search(r" iteration=2 .*order: Update of version 2$", line) for line in logs["learner-mailbox"])
    assert any("version 2 (policy): " in line for line in logs["weight-store"])


def scrape(address: str) -> str:
    import urllib.request

    with urllib.request.urlopen(address, timeout=10) as response:
        return str(response.read().decode())


def newest_folder(run: Path) -> Path:
    newest = CheckpointStore(run / "checkpoints", 2).newest()
    assert newest is not None
    return newest.folder


def check_export_in_clean_process(run: Path, tmp_path: Path) -> None:
    """A process with diffusers alone draws the latents that the policy in memory draws."""
    from actors.rollout import RolloutWorker
    from euphonium.config import load_config

    script = textwrap.dedent("""
        import sys, torch, numpy as np
        from diffusers import DiffusionPipeline
        torch.set_num_threads(1)
        pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
        out = pipeline(sys.argv[2], num_frames=9, height=32, width=32, num_inference_steps=4, max_sequence_length=16,
                       generator=torch.Generator().manual_seed(17), output_type="latent")
        np.save(sys.argv[3], out.frames.numpy())
        assert not {"dynamics", "models", "core", "ray", "deepspeed"} & set(sys.modules)
    """)
    target = tmp_path / "latents.npy"
    subprocess.run(
        [sys.executable, "-c", script, str(run / "export"), PROMPT, str(target)], cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip
    config = load_config(run / "config.resolved.yaml")
    worker = RolloutWorker(config, torch.device("cpu"))
    worker.transformer.load_state_dict(load_file(newest_folder(run) / "average.safetensors"))
    ours = worker.evaluate([PROMPT], [17])
    np.testing.assert_allclose(ours, np.load(target), atol=1e-5)


def check_generate_and_evaluate(run: Path, tmp_path: Path) -> None:
    generate = Process("generate", str(run), "-p", PROMPT, "-o", str(tmp_path / "clips"), "--steps", "3")
    assert generate.finish() == 0, generate.output
    assert (tmp_path / "clips" / "0000-0.gif").stat().st_size > 500
    evaluate = Process("evaluate", str(run), "--samples-per-prompt", "2")
    assert evaluate.finish() == 0, evaluate.output
    report = json.loads(evaluate.output[evaluate.output.index("{") :])
    assert report["prompts"] == 4
    assert 0 <= report["total"]["mean"] <= 1


def kill_prm() -> int:
    (server,) = ray_processes("ray::PrmActor") or ray_processes("ray::prm-0")
    server.send_signal(signal.SIGKILL)
    return int(server.pid)


def test_a_run_recovers_from_a_killed_prm_server_and_without_any_ends_with_an_error_that_names_the_pool(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(
        "iterations=400", "rewards.attempts=6", "rewards.deadline_s=30", "evaluation.every=4", "model.dtype=bfloat16",
        "pools.learner.weight_transport=collective", "pools.prm.max_restarts=1",
    )  # fmt: skip
    process = Process("train", str(path))
    process.wait_for("iteration   3/400")
    kill_prm()
    process.wait_for("iteration  12/400")
    kill_prm()
    began = time.monotonic()
    assert process.finish() == 5, process.output
    assert time.monotonic() - began < 90
    last = process.lines[-1]
    assert last.startswith("error:")
    assert "prm pool" in last
    assert "pools.prm" in last

    after = records(tmp_path / "runs" / "tiny")
    assert [r["iteration"] for r in after] == list(range(len(after)))
    assert len(after) > 12
    # Every group of every iteration was scored by a living server: a zero would show as a reward without spread.
    for record in after[1:]:
        assert record["rollout/groups"] + record["rollout/dropped_groups"] == 2
        assert abs(record["process/mean"]) > 1e-6
        # Weights that nobody has to keep for an evaluation went by broadcast, and were those that the learner has.
        assert record["weights/receivers"] == (0 if record["iteration"] % 4 == 0 else 2)
        # In bfloat16 rollout and learner agree but for its rounding, which does not reach the ratio.
        assert record["policy/ratio_deviation"] < 1e-3
        assert record["policy/ratio_mean"] == 1
        assert record["policy/clip_fraction"] == 0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def test_ray_job_submit_runs_the_same_command(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("iterations=1", "evaluation.clips=0")
    token = tmp_path / "token"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray = [str(Path(sys.executable).with_name("ray"))]
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)

    def call(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*ray, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )

    # Ray's defaults are taken if another cluster runs on this machine.
    dashboard, agent = free_ports(2)
    started = call(
        "start", "--head", "--num-cpus=4", "--port=0", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        deadline = time.monotonic() + 120
        while True:
            submitted = call(
                "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", ".",
                "--", sys.executable, "-m", "orchestrator", "train", str(path),
            )  # fmt: skip
            # `ray start` returns before its node takes jobs.
            if "No available agent" not in submitted.stdout + submitted.stderr or time.monotonic() > deadline:
                break
            time.sleep(2)
        assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-2000:]
        assert "iteration 1/1" in submitted.stdout
        listed = call("list", "actors", "--address", f"http://127.0.0.1:{dashboard}", "--format", "json")
        names = {actor["name"] for actor in json.loads(listed.stdout)}
        assert {"rollout-0", "rollout-1", "prm-0", "orm-0", "learner-mailbox", "weight-store"} <= names
    finally:
        # Not `ray stop`, which ends every cluster of this machine.
        for process in ray_processes(""):
            process.kill()
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)

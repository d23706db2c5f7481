"""``euphonium plan`` and ``validate`` on the command line: what is printed, and the status."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from euphonium.config import RunConfig
from orchestrator.commands.cli import run_command

GPUS = [f"pools.{pool}.num_gpus=1" for pool in ("rollout", "prm", "orm", "learner")]


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def measurements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(
    measurements: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The command line, whose measurements are the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(measurements))

    def run(*arguments: str) -> Done:
        capfd.readouterr()
        status = run_command(list(arguments))
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def euphonium(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path, command: Callable[..., Done]
) -> Callable[..., Done]:
    tiny_recipe_file(tmp_path)
    return lambda name, *arguments: command(name, str(tmp_path / "recipe.yaml"), *arguments)


def test_a_plan_that_fits(euphonium: Callable[..., Done]) -> None:
    done = euphonium("plan", *GPUS)
    assert done.returncode == 0, done.stderr
    assert "it fits" in done.stdout
    assert "mfu 0.4" in done.stdout
    assert "5 GPUs of 80 GiB" not in done.stdout
    assert "6 GPUs of 80 GiB, on 1 node of 8" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_what_split_tails_save_is_said(euphonium: Callable[..., Done]) -> None:
    three = ("rollout.prompts_per_iteration=3", "rollout.group_size=4")
    assert "waves of rollouts" not in euphonium("plan", *three).stdout
    said = "1.5 instead of 2: 2 actors draw the last 1 of 3 groups in 2 parts each"
    done = euphonium("plan", *three, "rollout.split_tail=true")
    assert f"waves of rollouts: {said}" in done.stdout, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    done = euphonium("validate", *three, "rollout.split_tail=true")
    assert said in done.stdout, done.stderr
    full = euphonium("validate", *three, "rollout.split_tail=true", "pools.rollout.num_actors=3").stdout
    assert "1, with rollout.split_tail as without: no wave of 3 actors gets shorter" in full


def test_a_plan_for_programs(euphonium: Callable[..., Done]) -> None:
    plan = json.loads(euphonium("plan", *GPUS, "--json", "--assume", "mfu=0.2").stdout)
    assert plan["gpus"] == 6
    assert plan["hardware"]["mfu"] == 0.2
    assert {fit["role"]: fit["members"] for fit in plan["fits"]} == {"rollout": 2, "prm": 1, "orm": 1, "learner": 2}
    assert plan["time"]["total"] > 0
    assert plan["problems"] == []


def test_what_does_not_fit_has_the_status_of_a_configuration_error(
    euphonium: Callable[..., Done],
) -> None:
    done = euphonium("plan", *GPUS, "--gpu", "2", "--host", "10", "--nodes", "1", "--gpus-per-node", "4")
    assert done.returncode == 2
    assert "does not fit: " in done.stdout
    assert "error: the plan does not fit:" in done.stderr
    assert "GiB of the 2 on" in done.stderr or "of the learner needs" in done.stderr
    assert "host memory of its 10" in done.stderr
    assert "they take 6 GPUs, and 1 nodes of 4 have 4" in done.stderr
    assert euphonium("plan", "--assume", "mfus=1").returncode == 2


AUTO = ["rollout.samples_per_pass=auto", "pools.orm.decode_batch=auto", "pools.learner.shard=auto"]


def test_what_is_chosen_is_printed(euphonium: Callable[..., Done]) -> None:
    done = euphonium("plan", *GPUS, *AUTO, "--gpu", "80")
    assert done.returncode == 0, done.stderr
    assert "rollout.samples_per_pass: auto -> 3: " in done.stdout
    assert "pools.learner.shard: auto -> " in done.stdout
    done = euphonium("validate", *GPUS, *AUTO)
    assert done.returncode == 0, done.stderr
    assert "# rollout.samples_per_pass" in done.stdout
    assert "auto -> 1: the smallest, as pools.gpu_memory_gib does not say what a GPU has" in done.stdout
    # The recipe that is printed has numbers.
    assert "samples_per_pass: 1\n" in done.stdout


def test_the_training_of_a_process_reward_model_is_planned(command: Callable[..., Done]) -> None:
    arguments = ["plan", "recipes/embedded/prm.yaml", "pairs.samples_per_pass=auto"]

    done = command(*arguments, "--gpu", "80")
    assert done.returncode == 0, done.stderr
    assert "pairs.samples_per_pass: auto -> 16: " in done.stdout
    assert "samples that are drawn: " in done.stdout
    assert "it fits" in done.stdout
    plan = json.loads(command(*arguments, "--gpu", "0.5", "--json").stdout)
    assert plan["samples"] > 0
    assert any(problem.startswith("optimizer.pairs_per_micro_batch") for problem in plan["problems"])


def test_validate_warns_and_refuses_where_the_memory_is_stated(
    euphonium: Callable[..., Done],
) -> None:
    done = euphonium("validate", *GPUS, "pools.gpu_memory_gib=2")
    assert done.returncode == 2
    assert "the plan does not fit" in done.stderr
    done = euphonium("validate", *GPUS, "pools.gpu_memory_gib=80")
    assert done.returncode == 0, done.stderr
    assert "# GiB of a GPU" in done.stdout
    assert "# estimated iteration" in done.stdout

"""Parts of a run by themselves: what is drawn, kept, read back, compared, trained on and looked at."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from euphonium.config import RunConfig, dump_config
from orchestrator.commands.cli import run_command
from orchestrator.debug.drawing import Drawer, load_group, save_group, saved_iterations
from orchestrator.debug.training import describe_alignment
from orchestrator.groups.prompts import PromptStream, read_prompts
from orchestrator.report.tracking import Progress
from tests.checkout import environment


@pytest.fixture(scope="module")
def config(tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_recipe_file(tmp_path_factory.mktemp("debug"), "objective.kind=standard")


@pytest.fixture(scope="module")
def recipe(config: RunConfig) -> Path:
    path = config.output_dir.parent / "resolved.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.fixture(scope="module")
def groups(recipe: Path) -> Path:
    folder = recipe.parent / "groups"
    assert run_command(["debug", "rollout", str(recipe), "-o", str(folder), "--iterations", "2"]) == 0
    return folder


def test_the_groups_of_a_run_are_on_disk_with_its_prompts_and_seeds(config: RunConfig, groups: Path) -> None:
    files = saved_iterations(groups)
    assert [len(of_iteration) for of_iteration in files] == [2, 2]
    stream = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
    tasks = [load_group(file).info.task for of_iteration in files for file in of_iteration]
    assert tasks == [stream.task(i, i // 2) for i in range(4)]


def test_a_group_comes_back_from_disk_as_it_was(config: RunConfig, tmp_path: Path) -> None:
    drawn = Drawer(config).draw(0, 0, "a yellow star moving up on a gray background")
    back = load_group(save_group(drawn, tmp_path))
    assert back.info.task == drawn.info.task
    assert drawn.payload.gradients is not None
    for name in ("states", "rows", "next_rows", "steps", "log_probs", "gradients"):
        one, other = getattr(back.payload, name), getattr(drawn.payload, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(back.info.rows, drawn.info.rows)
    assert back.info.process_rewards is not None
    np.testing.assert_array_equal(back.info.process_rewards, drawn.info.process_rewards)
    assert back.payload.conditioning.keys() == drawn.payload.conditioning.keys()
    for name, array in drawn.payload.conditioning.items():
        assert back.payload.conditioning[name].tobytes() == array.tobytes()
    assert {name: values.tolist() for name, values in back.scores.items()} == {
        name: values.tolist() for name, values in drawn.scores.items()
    }


def test_the_probe_finds_the_step_at_which_rollout_and_learner_differ(
    recipe: Path, groups: Path, tmp_path: Path
) -> None:
    agreeing = command("probe", recipe, "--groups", groups)
    assert "rollout and learner agree" in agreeing
    for file in saved_iterations(groups)[0]:
        target = tmp_path / file.relative_to(groups)
        target.parent.mkdir(parents=True, exist_ok=True)
        with safe_open(file, framework="pt") as stream:
            about = stream.metadata()
        tensors = load_file(file)
        tensors["log_probs"][tensors["steps"] == 2] -= 0.01
        save_file(tensors, target, about)
    found = command("probe", recipe, "--groups", tmp_path)
    values = {line.split(" |")[0].strip(): float(line.split()[-1]) for line in found.splitlines() if "|ratio" in line}
    assert values["step 2"] == pytest.approx(np.expm1(0.01), rel=0.01)
    assert values["step 1"] < 1e-4
    assert "a run would end: above objective.ratio_tolerance" in found


def test_training_on_saved_groups_by_two_ranks_writes_the_metrics_of_a_run(
    recipe: Path, groups: Path, tmp_path: Path
) -> None:
    said = command("train", recipe, "--groups", groups, "-o", tmp_path / "out", ranks=2)
    assert said.count("iteration 1/2") == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(record["policy/grad_norm"] > 0 and "reward/icon/mean" in record for record in records)
    assert records[0]["policy/ratio_deviation"] < 1e-5
    assert run_command(["report", str(tmp_path / "out")]) == 0


def command(mode: str, recipe: Path, *arguments: object, ranks: int = 0) -> str:
    program = [sys.executable, "-m"]
    if ranks:
        program += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=127.0.0.1:0", "-m"]  # fmt: skip
    result = subprocess.run(
        [*program, "orchestrator", "debug", mode, str(recipe), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=500, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-8000:]
    return result.stdout


def test_one_group_is_shown_transition_by_transition(
    config: RunConfig, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # What a run would choose is chosen here too.
    sizes = ["rollout.samples_per_pass=auto", "pools.learner.rows_per_micro_batch=auto"]
    assert run_command(["debug", "group", str(recipe), *sizes, "-o", str(tmp_path), "--ordinal", "1"]) == 0
    with (tmp_path / "group.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    size, steps = config.rollout.group_size, sorted({int(row["step"]) for row in rows})
    assert len(rows) == size * len(steps)
    drawn = Drawer(config).draw(1, 0)
    for row in rows:
        sample, k = int(row["sample"]), int(row["step"])
        (column,) = np.flatnonzero(drawn.payload.steps[sample] == k)
        assert float(row["log_prob_rollout"]) == pytest.approx(float(drawn.payload.log_probs[sample, column]))
        assert float(row["ratio"]) == pytest.approx(1.0, abs=1e-4)
        assert drawn.info.process_rewards is not None
        assert float(row["process_reward"]) == pytest.approx(float(drawn.info.process_rewards[sample, k]), abs=1e-5)
        assert float(row["step_grad_norm"]) > 0
    # Advantages are centred within a group.
    assert sum(float(row["advantage"]) for row in rows) == pytest.approx(0, abs=1e-3)
    picture = Image.open(tmp_path / "group.png")
    assert picture.width > len(steps) * 64
    assert "grad norm" in capfd.readouterr().out


def test_folders_without_groups_and_files_that_are_none_are_named(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["debug", "probe", str(recipe), "--groups", str(tmp_path)]) == 2
    assert "holds no drawn groups; draw some with: euphonium debug rollout RECIPE" in capfd.readouterr().err
    file = tmp_path / "iteration_000000" / "group_000000.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"nonsense")
    assert run_command(["debug", "probe", str(recipe), "--groups", str(tmp_path)]) == 2
    assert "is no drawn group" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("mean", "p99", "verdict"),
    [(1e-9, 1e-9, "agree"), (5e-4, 1e-9, "would warn"), (5e-3, 1e-9, "would end"), (1e-9, 0.5, "would end")],
)
def test_the_verdict_is_that_of_a_run(config: RunConfig, mean: float, p99: float, verdict: str) -> None:
    assert verdict in describe_alignment(config, {"mean": mean, "p99": p99})[-1]


def test_noised_samples_are_trained_on_and_have_no_probabilities(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_recipe_file(
        tmp_path, "objective.kind=nft", "sampler.law=ode", "sampler.eta=null", "sampler.shared_noise=false",
        "sampler.guidance=null", "rewards.process=null",
    )  # fmt: skip
    recipe, groups = tmp_path / "resolved.yaml", tmp_path / "groups"
    recipe.write_text(dump_config(config))
    assert run_command(["debug", "rollout", str(recipe), "-o", str(groups)]) == 0
    for arguments in (["probe", str(recipe), "--groups", str(groups)], ["group", str(recipe)]):
        assert run_command(["debug", *arguments]) == 2
        assert "objective.kind: nft trains on noised samples" in capfd.readouterr().err
    assert "denoising_error" in command("train", recipe, "--groups", groups, "-o", tmp_path / "out")
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert record["policy/grad_norm"] > 0
    assert "policy/ratio_deviation" not in record
    assert "ratio-1" not in Progress(1, 0).iteration(record)

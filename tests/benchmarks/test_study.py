"""The study's runner and tables."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import runs
from benchmarks.study.__main__ import command
from benchmarks.study.plans import PLANS, QUICK
from benchmarks.study.runs import Method, Trial, run_all
from benchmarks.study.tables import Row, as_json, iterations_to, markdown, plot, rows, speed
from euphonium.config import load_config
from euphonium.errors import ConfigError

SMALL = (*QUICK, "rollout.prompts_per_iteration=2", "rollout.group_size=2", "evaluation.prompts=2")


def row(name: str, *curves: list[float]) -> Row:
    return Row(name, tuple(range(len(curves))), tuple(range(0, 2 * len(curves[0]), 2)), np.array(curves))


@pytest.mark.parametrize("table", sorted(PLANS))
def test_every_row_of_a_table_is_a_configuration(table: str) -> None:
    plan = PLANS[table]
    assert plan.reference in [method.name for method in plan.methods]
    assert len({method.name for method in plan.methods}) == len(plan.methods)
    for method in plan.methods:
        recipe, *overrides = Trial(method, 1, QUICK).arguments
        assert load_config(recipe, overrides).seed == 1


def test_speed_is_the_ratio_of_the_iterations_to_the_reference_s_best() -> None:
    reference = row("reference", [0.0, 0.1, 0.2, 0.3], [0.0, 0.1, 0.2, 0.4])
    twice = row("twice", [0.0, 0.2, 0.4, 0.4], [0.0, 0.2, 0.4, 0.5])
    assert speed(reference, reference).ratio == 1
    measured = speed(twice, reference)
    assert measured.ratio == pytest.approx(6 / 3.5)
    assert measured.low <= measured.ratio <= measured.high
    never = speed(row("never", [0.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.4, 0.5]), reference)
    assert (never.ratio, never.reached) == (0, 0.5)
    assert iterations_to(0.0, [0, 2], np.array([0.1, 0.2])) == 0


def test_tables_and_plots_hold_every_row() -> None:
    found = [row("reference", [0.1, 0.2], [0.1, 0.3]), row("other", [0.1, 0.4], [0.1, 0.5])]
    table = markdown(found, "reference")
    assert "| other | 2 | 0.450 ± 0.050 | 1.00 | " in table
    picture = plot(found, "title")
    assert picture.count("<polyline") == 2
    assert ">other</text>" in picture
    assert json.loads(json.dumps(as_json(found)))[1]["values"] == [[0.1, 0.4], [0.1, 0.5]]


def test_a_finished_run_is_not_run_again_and_a_broken_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "run_one", lambda trial, folder: calls.append(trial.seed) or write(trial, folder))
    calls: list[int] = []

    def write(trial: Trial, folder: Path) -> None:
        (folder / f"{trial.key}.jsonl").write_text('{"iteration": 0, "eval/total/mean": 0.5}\n')

    method = Method("a method", "dancegrpo.yaml")
    trials = [Trial(method, seed) for seed in (1, 2)]
    (tmp_path / f"{trials[0].key}.part").write_text("{")
    records = run_all(trials, tmp_path, jobs=1)
    assert calls == [1, 2]
    assert [record.curve() for record in records] == [{0: 0.5}] * 2
    run_all([*trials, Trial(method, 3)], tmp_path, jobs=2)
    assert calls == [1, 2, 3]
    assert "2 of 3 runs are done already" in capsys.readouterr().out


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="itarations"):
        run_all([Trial(Method("typing error", "dancegrpo.yaml", ("itarations=2",)), 1)], tmp_path, jobs=1)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_run_of_other_settings_is_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    method = Method("a method", "a.yaml")
    monkeypatch.setattr(runs, "RECIPES", tmp_path)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "weights_digest", lambda: "weights")
    keys = []
    for rate in ("1e-4", "1e-4", "2e-4"):
        extends = Path("recipes/embedded/dancegrpo.yaml").resolve()
        recipe.write_text(f"extends: {extends}\noptimizer: {{ learning_rate: {rate} }}\n")
        keys.append(Trial(method, 1).key)
    monkeypatch.setattr(runs, "weights_digest", lambda: "others")
    keys.append(Trial(method, 1).key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_real_run_ends_in_a_record(tmp_path: Path) -> None:
    trial = Trial(Method("DanceGRPO", "dancegrpo.yaml"), 1, (*SMALL, "objective.updates_per_iteration=1"))
    (record,) = run_all([trial], tmp_path, jobs=1)
    assert sorted(record.curve()) == [0, 1, 2]
    assert [r.values.shape for r in rows([record])] == [(1, 3)]


def test_the_command_of_a_table_says_nothing_of_the_machine() -> None:
    kept = {"folder": Path("/somewhere/runs"), "output": Path("/somewhere/else"), "jobs": 2, "quick": False}
    settings = Namespace(table="convergence", seeds=[1, 2], iterations=12, methods=["no guidance", "ours"], **kept)
    assert command(settings) == (
        "python -m benchmarks.study convergence --seeds 1 2 --iterations 12 --methods 'no guidance' ours"
    )
    assert "--methods" not in command(Namespace(**{**vars(settings), "methods": None}))

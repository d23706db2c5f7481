"""A process reward model trained by two real ZeRO-3 ranks, against one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from euphonium.config import RunConfig, dump_config
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from learners.engine.local import LocalEngine
from learners.rewards.outcome import OrmTraining
from learners.rewards.preference import PrmTask
from learners.rewards.training import Task, fit
from tests.learners.rewards.tiny_backbone import tiny_orm_recipe
from tests.learners.rewards.toy_preferences import CPU, Mortal, toy_preferences, toy_settings
from tests.ranks import run_ranks

KINDS = ("weights", "average", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def both(tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    config = tiny_recipe_file(folder)
    (folder / "recipe.yaml").write_text(dump_config(config))
    settings, data = toy_settings(eps=1e-4), toy_preferences()
    task = PrmTask(data, data, settings, 0, CPU)

    def train(where: str, task: Task) -> tuple[LocalEngine, list[dict]]:
        torch.manual_seed(0)
        model = ProcessRewardModel.from_generator(open_generator(config.model), 1).for_training()
        engine, records = LocalEngine(model, settings, CPU), []
        fit(engine, task, settings, folder / where, "mark", records.append)
        return engine, records

    engine, records = train("local", task)
    with pytest.raises(KeyboardInterrupt):
        train("died", Mortal(task, die_in=5))
    few = {"updates": 3, "pairs_per_update": 4, "pairs_per_micro_batch": 1, "learning_rate": 1e-3, "eps": 1e-4}
    orm = tiny_orm_recipe(folder, few)
    (folder / "orm.json").write_text(orm.model_dump_json())
    run_ranks(2, Path(__file__).with_name("zero3_worker.py"), folder, timeout_s=300)
    ranks = [torch.load(folder / f"reward_rank_{r}.pt", weights_only=False) for r in (0, 1)]
    state = {kind: engine.whole(kind) for kind in KINDS}
    return {"ranks": ranks, "engine": engine, "state": state, "records": records, "orm": orm}


def largest_gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_two_ranks_end_with_the_weights_of_one_process(both: dict) -> None:
    zero = both["ranks"][0]
    for kind in KINDS:
        assert largest_gap(zero["state"][kind], both["state"][kind]) < 1e-5, kind
    assert [r["loss"] for r in zero["records"]] == pytest.approx([r["loss"] for r in both["records"]], abs=1e-5)
    assert both["ranks"][1]["records"] == []
    assert both["ranks"][1]["state"]["weights"] == {}


def test_measurements_are_of_the_averages_and_leave_the_weights_alone(both: dict) -> None:
    first, second = both["ranks"]
    data = toy_preferences()

    def ours() -> dict:
        with both["engine"].averaged():
            return PrmTask(data, data, toy_settings(), 0, CPU).evaluate(both["engine"], 24)

    trained = ours()
    torch.manual_seed(0)
    start = ProcessRewardModel.from_generator(both["engine"].model.family, 1)
    both["engine"].restore_averages(dict(start.named_parameters()).__getitem__)
    fresh = ours()
    for name, expected in (("measured", trained), ("at_start", fresh)):
        assert first[name] == second[name]
        assert first[name]["accuracy"] == expected["accuracy"]
        assert first[name]["calibration_error"] == pytest.approx(expected["calibration_error"], abs=1e-4)
    assert abs(fresh["calibration_error"][0] - trained["calibration_error"][0]) > 1e-2
    assert largest_gap(first["after"], first["state"]["weights"]) == 0


def test_every_rank_holds_half(both: dict) -> None:
    whole = sum(p.numel() for p in both["engine"].parameters.values())
    for rank in both["ranks"]:
        assert whole / 2 <= rank["held"] < whole / 2 * 1.01


def test_a_checkpoint_of_one_process_is_taken_up_by_two_ranks(both: dict) -> None:
    zero = both["ranks"][0]
    assert zero["continued"][0] == {"resumed": 4}
    for kind in KINDS:
        assert largest_gap(zero["resumed"][kind], both["state"][kind]) < 1e-5, kind


def test_an_outcome_model_on_two_ranks_ends_with_the_weights_of_one_process(both: dict, tmp_path: Path) -> None:
    orm = both["orm"]
    training = OrmTraining(orm, CPU)
    start = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    engine = LocalEngine(training.model, orm.optimizer, CPU)
    fit(engine, training.task, orm.optimizer, tmp_path, "mark", lambda _: None)
    zero = both["ranks"][0]["outcome"]
    # Input and output embeddings of the backbone are one parameter.
    assert largest_gap(zero, engine.whole("weights")) < 1e-5
    assert largest_gap(zero, start) > 1e-3

"""Plans of the trainings of reward models: what is held, drawn and kept on disk, and the choice of ``auto``."""

from pathlib import Path
from typing import Any

import pytest

from euphonium.config import OrmConfig, PrmConfig, RewardOptimizerConfig, load_config
from euphonium.config.pools import TrainingGroupConfig
from orchestrator.commands.planning import settle_training
from orchestrator.plan.hardware import GIB, Hardware
from orchestrator.plan.networks import NetworkPasses, prompt_bytes
from orchestrator.plan.outcome_passes import OutcomePasses
from orchestrator.plan.reward_choice import choose_drawn
from orchestrator.plan.reward_memory import Trained, training_memory
from orchestrator.plan.reward_plan import plan_orm, plan_prm, reward_table
from tests.learners.rewards.tiny_backbone import tiny_orm_recipe
from tests.orchestrator.plan.models import medium

BARE = Hardware(gpu_gib=80, reserved_gib=0.0, fragmentation=0.0)
PROMPTS = {"train": 10, "evaluation": 3}


def recipe(folder: Path, **changes: Any) -> PrmConfig:
    sections: dict[str, Any] = {
        "name": "prm", "output_dir": str(folder / "runs"), "target": str(folder / "target"), "blocks": 4,
        "model": medium("hunyuan-video", folder / "model").model.model_dump(),
        "prompts": {"train": "train.txt", "evaluation": "held_out.txt"},
        "outcome": [{"name": "icon", "type": "sprite_icon"}],
        "pairs": {"samples_per_prompt": 4, "held_out_samples_per_prompt": 2, "num_steps": 5, "samples_per_pass": 2},
        "optimizer": {"updates": 10, "pairs_per_update": 8, "pairs_per_micro_batch": 2},
        "learner": {"num_workers": 2, "num_gpus": 1},
    }  # fmt: skip
    return PrmConfig.model_validate(sections | changes)


def test_what_is_drawn_is_counted(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    plan, passes = plan_prm(config, Hardware(), PROMPTS), NetworkPasses(config.model, 4)
    assert [(fit.role, fit.members) for fit in plan.fits] == [("encoding", 1), ("drawing", 2), ("training", 2)]
    assert plan.samples == 10 * 4 + 3 * 2
    assert plan.disk_bytes == 46 * passes.latent_bytes + 13 * prompt_bytes(passes.generator)
    drawn = 46 * (5 * passes.velocity(2).flops / 2 + passes.decode(1).flops)
    assert plan.petaflops["drawing"] == pytest.approx(drawn / 1e15)
    assert plan.petaflops["training"] == pytest.approx(10 * 8 * passes.pair_step(2).flops / 2 / 1e15)
    # Twice the processes draw in half the time.
    wider = plan_prm(recipe(tmp_path, learner={"num_workers": 4, "num_gpus": 1}), Hardware(), PROMPTS)
    assert wider.seconds["drawing"] == pytest.approx(plan.seconds["drawing"] / 2)
    assert not plan.problems
    assert max(map(len, reward_table(plan).splitlines())) <= 100


def test_without_prompts_only_memory_is_planned(tmp_path: Path) -> None:
    plan = plan_prm(recipe(tmp_path), Hardware())
    assert (plan.samples, plan.disk_bytes) == (None, 0)
    assert [fit.role for fit in plan.fits] == ["encoding", "drawing", "training"]
    given = {"preferences": {"train": "pairs.jsonl"}, "prompts": None, "outcome": []}
    assert [fit.role for fit in plan_prm(recipe(tmp_path, **given), Hardware()).fits] == ["training"]


def test_ranks_share_states_and_a_process_alone_has_them_all(tmp_path: Path) -> None:
    config, settings = recipe(tmp_path), RewardOptimizerConfig(updates=1)
    passes = NetworkPasses(config.model, 4)
    size = passes.prm_size
    trained = Trained(
        size=type(size)(size.parameters, size.weight_bytes, size.parameters, size.unit), width=4, pairs=1,
        step=passes.pair_step(1),
    )  # fmt: skip

    def resting(learner: TrainingGroupConfig | None) -> float:
        return training_memory(trained, learner, settings).resting_gib(BARE) * GIB

    bucket = 4 * 5e8
    assert resting(None) == 16 * size.parameters
    for ranks in (1, 4):
        shared = resting(TrainingGroupConfig(num_workers=ranks, num_gpus=1)) - bucket
        assert shared == pytest.approx((4 + 12 + 4 + 4) * size.parameters / ranks)
    away = TrainingGroupConfig(num_workers=1, num_gpus=1, offload_optimizer=True)
    assert resting(away) - bucket == pytest.approx(8 * size.parameters)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    drawing, training = (plan_prm(recipe(tmp_path), Hardware()).fits[i].gpu_gib for i in (1, 2))
    problems = plan_prm(recipe(tmp_path), Hardware(gpu_gib=training * 0.999)).problems
    assert problems[0].startswith("optimizer.pairs_per_micro_batch: 2: training needs")
    problems = plan_prm(recipe(tmp_path), Hardware(gpu_gib=drawing * 0.999)).problems
    assert any(problem.startswith("pairs.samples_per_pass: 2: drawing needs") for problem in problems)


def test_samples_of_a_pass_are_chosen_and_recorded(tmp_path: Path) -> None:
    def pairs(samples: object) -> dict[str, Any]:
        return {"pairs": {"samples_per_pass": samples}}

    written = recipe(tmp_path, **pairs("auto"), gpu_memory_gib=80)
    assert choose_drawn(written, 80).pairs.samples_per_pass == 16
    assert choose_drawn(written, None).pairs.samples_per_pass == 1
    on_cpus = recipe(tmp_path, **pairs("auto"), learner={"num_workers": 2})
    assert choose_drawn(on_cpus, 80).pairs.samples_per_pass == 16
    fixed = recipe(tmp_path, **pairs(3))
    assert settle_training(fixed) == fixed
    assert not fixed.run_dir.exists()
    began = settle_training(written)
    assert began.planned["pairs.samples_per_pass"].startswith("auto -> 16: ")
    # The same training on smaller GPUs goes on with what it has.
    again = settle_training(written.model_copy(update={"gpu_memory_gib": 1.0}))
    assert again.pairs.samples_per_pass == 16
    assert load_config(began.run_dir / "config.resolved.yaml", (), PrmConfig).planned == began.planned


@pytest.fixture
def outcome(tmp_path: Path) -> OrmConfig:
    return tiny_orm_recipe(tmp_path, {"updates": 6, "pairs_per_update": 4, "pairs_per_micro_batch": 2})


def test_an_outcome_reward_model_is_planned_with_its_videos(outcome: OrmConfig) -> None:
    plan = plan_orm(outcome, Hardware())
    assert [fit.role for fit in plan.fits] == ["training"]
    one, two = (OutcomePasses(outcome).step(pairs) for pairs in (1, 2))
    assert 1.8 * one.peak_bytes < two.peak_bytes < 2.1 * one.peak_bytes
    assert plan.petaflops["training"] == pytest.approx(6 * 4 * two.flops / 2 / 1e15)
    assert "outcome reward model" in reward_table(plan)


def test_frozen_parts_have_no_states(outcome: OrmConfig) -> None:
    def trained(parts: str) -> int:
        model = outcome.model.model_copy(update={"trained": parts})
        return OutcomePasses(outcome.model_copy(update={"model": model})).size.trained

    assert trained("head") < trained("language") < trained("all")

"""Every recipe that is shipped: it can be read, its arithmetic works, and its numbers are those that it cites."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from euphonium.config import OrmConfig, PrmConfig, RunConfig, dump_config, load_config
from euphonium.errors import ConfigError
from euphonium.generators.described import describe_generator
from euphonium.generators.registry import open_generator
from euphonium.rewards.base import OutcomeReward
from euphonium.rewards.process import ProcessRewardModel
from euphonium.rewards.registry import build_reward, find_reward, options_of

ROOT = Path("recipes")
# A base holds what recipes share and is no recipe: it may lack required fields.
RECIPES = sorted(path for path in ROOT.rglob("*.yaml") if path.name not in ("base.yaml", "orm.yaml"))
ORM = sorted(ROOT.rglob("orm.yaml"))
PRM = [path for path in RECIPES if path.name == "prm.yaml"]
RUNS = [path for path in RECIPES if path.name != "prm.yaml"]
METHODS = {
    "euphonium-script", "dancegrpo", "flow-grpo", "flow-grpo-fast", "cps", "mixgrpo", "sage-grpo-a", "sage-grpo-b",
    "euphonium-sage", "nft", "dpo",
}  # fmt: skip


def load(path: Path) -> RunConfig:
    return load_config(path)


def extended(path: Path) -> list[Path]:
    """A recipe and those that it extends."""
    parent = yaml.safe_load(path.read_text()).get("extends")
    return [path, *([] if parent is None else extended(path.parent / parent))]


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_a_run_loads_and_writes_back(path: Path) -> None:
    config = load(path)
    assert yaml.safe_load(dump_config(config))["name"] == config.name


@pytest.mark.parametrize("path", ORM, ids=str)
def test_an_outcome_reward_training_loads(path: Path) -> None:
    config = load_config(path, [], OrmConfig)
    assert config.model.path == "OpenGVLab/InternVL3-1B-hf"
    assert config.objective == "bradley_terry"


@pytest.mark.parametrize("path", PRM, ids=str)
def test_a_process_reward_training_loads(path: Path) -> None:
    assert load_config(path, [], PrmConfig).optimizer.updates > 0


@pytest.mark.parametrize("field", ["rows_per_micro_batch=auto", "shard=auto", "weight_transport=collective"])
def test_a_reward_training_refuses_what_only_a_policy_has(field: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key 'learner.{field.split('=')[0]}'"):
        load_config(ROOT / "embedded" / "prm.yaml", [f"learner.{field}"], PrmConfig)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_outcome_rewards_are_there_and_take_their_options(path: Path) -> None:
    rewards = load_config(path, [], PrmConfig).outcome if path in PRM else load(path).rewards.outcome
    assert rewards
    for reward in rewards:
        options = options_of(find_reward(reward))
        assert options is not None
        assert set(reward.options) <= set(options.model_fields)
        required = {name for name, field in options.model_fields.items() if field.is_required()}
        # What a recipe cannot ship it asks for.
        text = "".join(file.read_text() for file in extended(path))
        assert all(name in text for name in required - set(reward.options)), reward.name
        if path.parent.name == "embedded":
            assert isinstance(build_reward(reward), OutcomeReward)


def test_an_outcome_reward_that_does_not_exist_is_refused() -> None:
    reward = load(ROOT / "flux" / "dancegrpo.yaml").rewards.outcome[0]
    with pytest.raises(ConfigError, match=r"rewards.outcome \(hps\).type: unknown reward 'hps_v2'.*'hps_v21'"):
        find_reward(reward.model_copy(update={"type": "hps_v2"}))
    with pytest.raises(ConfigError, match=r"cannot import 'euphonium\.rewards\.clip:HpsV22'"):
        find_reward(reward.model_copy(update={"type": "euphonium.rewards.clip:HpsV22"}))


@pytest.mark.parametrize("path", [path for path in RUNS if load(path).rewards.process is not None], ids=str)
def test_a_process_reward_is_that_of_its_training_recipe(path: Path) -> None:
    config, recipe = load(path), load_config(path.with_name("prm.yaml"), [], PrmConfig)
    process = config.rewards.process
    assert process is not None
    assert Path(process.path) == recipe.target
    for field in ("path", "frames", "height", "width", "embedded_guidance", "max_prompt_tokens"):
        assert getattr(config.model, field) == getattr(recipe.model, field), field
    assert process.steps == "all" or config.sampler.guidance is not None
    assert process.refresh is None or process.refresh.buffer_groups >= config.rollout.prompts_per_iteration
    if path.parent.name == "embedded":
        # Shipped: its blocks are the recipe's, and it is of this very generator.
        assert ProcessRewardModel.load(Path(process.path), config.model).blocks == recipe.blocks


def test_trunks_of_process_rewards_are_shorter_than_their_generators() -> None:
    blocks = {path.parent.name: load_config(path, [], PrmConfig).blocks for path in PRM}
    embedded = open_generator(load_config(ROOT / "embedded" / "prm.yaml", [], PrmConfig).model)
    counts = embedded.trunk_config(blocks["embedded"])
    assert sum(counts[field] for field in embedded.block_fields) == blocks["embedded"]
    # Table 7 of Euphonium.
    assert blocks["hunyuan-video"] == 8


@pytest.mark.parametrize("path", sorted(ROOT.rglob("base.yaml")), ids=str)
def test_a_base_has_no_unknown_keys_and_is_used(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert all("is missing" in line for line in str(caught.value).splitlines()[1:])
    assert any("extends: base.yaml" in recipe.read_text() for recipe in path.parent.glob("*.yaml"))


def test_names_of_runs_differ() -> None:
    names = [load(path).name for path in RUNS]
    assert len(set(names)) == len(names)


def test_all_methods_have_an_embedded_recipe() -> None:
    assert {path.stem for path in RUNS if path.parent.name == "embedded"} >= METHODS


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_the_step_table_is_finite(path: Path) -> None:
    config = load(path)
    family = describe_generator(config.model)
    for iteration in range(0, config.iterations, 5):
        table = family.step_table(config.sampler, iteration)
        for column in (table.coef_x, table.coef_v, table.std, table.coef_grad, table.equaliser()):
            assert torch.isfinite(column).all()
        assert bool(table.stochastic_steps) == (config.sampler.law != "ode")
        guidance = config.sampler.guidance
        assert bool(table.guided_steps) == (guidance is not None and guidance.at(iteration) is not None)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_every_learner_rank_has_work(path: Path) -> None:
    config = load(path)
    groups = config.rollout.prompts_per_iteration / config.objective.updates_per_iteration
    best = config.advantage.best_of
    samples = config.rollout.group_size if best is None else 2 * best
    assert groups * samples >= config.pools.learner.num_workers
    assert config.rollout.prompts_per_iteration % config.objective.updates_per_iteration == 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_embedded_recipes_differ_in_their_method_alone(method: str) -> None:
    config, other = load(ROOT / "embedded" / f"{method}.yaml"), load(ROOT / "embedded" / "dancegrpo.yaml")
    assert config.model == other.model
    assert config.prompts == other.prompts
    assert config.rollout.group_size == other.rollout.group_size
    assert (config.sampler.grid, config.sampler.shift) == (other.sampler.grid, other.sampler.shift)
    # Fewer steps may buy more samples, for no more work.
    steps = [c.rollout.prompts_per_iteration * c.sampler.num_steps for c in (config, other)]
    assert steps[0] <= steps[1]
    if config.sampler.num_steps == other.sampler.num_steps:
        assert config.rollout == other.rollout
    assert [reward.name for reward in config.rewards.outcome] == [reward.name for reward in other.rewards.outcome]


def test_euphonium_has_the_numbers_of_its_paper() -> None:
    config = load(ROOT / "hunyuan-video" / "euphonium.yaml")
    guidance = config.sampler.guidance
    assert guidance is not None
    assert config.sampler.eta**2 / 2 == pytest.approx(0.3125, rel=1e-6)
    # lambda is eps / beta (Eq. 20), with Table 7's beta.
    assert guidance.scale == pytest.approx(0.3125 / 3.125)
    table = describe_generator(config.model).step_table(config.sampler)
    # Table 7's steps 8 to 16, less the last, which has no noise and is not trained.
    assert table.guided_steps == list(range(8, 15))
    assert set(table.guided_steps) <= set(table.stochastic_steps)
    delta = table.sigmas[:-1] - table.sigmas[1:]
    assert torch.allclose(table.coef_grad[8:15], 0.1 * delta[8:15])
    assert float(table.std[8]) == pytest.approx(math.sqrt(2 * 0.3125 * float(delta[8])), rel=1e-6)
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    assert samples / config.objective.updates_per_iteration == 160


def test_euphonium_as_released_is_ten_times_weaker() -> None:
    paper = load(ROOT / "hunyuan-video" / "euphonium.yaml")
    script = load(ROOT / "hunyuan-video" / "euphonium-script.yaml")
    assert paper.sampler.guidance is not None
    assert script.sampler.guidance is not None
    assert script.sampler.guidance.scale == pytest.approx((paper.sampler.guidance.scale or 0) / 10)
    assert script.sampler.eta**2 == pytest.approx(paper.sampler.eta**2 / 10)
    # Its scale is that of its own KL weight: eta^2 / (2 beta).
    assert script.sampler.eta**2 / (2 * 3.125) == pytest.approx(script.sampler.guidance.scale)
    assert script.rewards.process is not None
    assert script.rewards.process.steps == "guided"
    assert script.advantage.combine == "losses"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("euphonium-script.yaml")), ids=str)
def test_a_doubled_weight_is_two_losses_because_no_advantage_reaches_the_clip(path: Path) -> None:
    config = load(path)
    size = config.rollout.group_size
    largest = (size - 1) / math.sqrt(size)  # one sample apart from all others, standard deviation with ddof 1
    assert max(reward.weight for reward in config.rewards.outcome) == 2
    assert 2 * largest < config.advantage.clip


def test_the_two_settings_of_sage_differ_in_weights_alone() -> None:
    for folder in ("embedded", "hunyuan-video-1.5"):
        first, second = load(ROOT / folder / "sage-grpo-a.yaml"), load(ROOT / folder / "sage-grpo-b.yaml")
        assert first.sampler == second.sampler
        assert first.objective == second.objective
        assert first.rewards != second.rewards


@pytest.mark.parametrize("path", sorted(ROOT.rglob("flash-grpo.yaml")), ids=str)
def test_flash_grpo_trains_one_step_a_prompt(path: Path) -> None:
    config = load(path)
    family = describe_generator(config.model)
    places = {tuple(family.step_table(config.sampler.of_group(i)).stochastic_steps) for i in range(100)}
    first_half = config.sampler.num_steps // 2
    assert places == {(k,) for k in range(first_half)}
    assert config.objective.step_weights == "rectified"


def test_sages_baselines_differ_from_it_in_sampler_and_objective_alone() -> None:
    sage = load(ROOT / "hunyuan-video-1.5" / "sage-grpo-a.yaml")
    for name, law in (("dancegrpo", "dance"), ("flow-grpo", "flow_grpo"), ("cps", "cps")):
        config = load(ROOT / "hunyuan-video-1.5" / f"{name}.yaml")
        assert config.sampler.law == law
        assert (config.objective.kl, config.objective.step_weights) == (None, "uniform")
        same = {"name": sage.name, "sampler": sage.sampler, "objective": sage.objective}
        assert config.model_copy(update=same) == sage


def test_sages_controller_leaves_its_warm_up() -> None:
    for path in RUNS:
        config = load(path)
        kl = config.objective.kl
        if kl is not None and kl.controller is not None:
            updates = config.iterations * config.objective.updates_per_iteration
            assert kl.controller.warmup_updates < updates, path


def test_mixgrpos_window_visits_every_place_of_the_embedded_grid() -> None:
    config = load(ROOT / "embedded" / "mixgrpo.yaml")
    assert {config.sampler.window(k) for k in range(config.iterations)} == {(k, k + 2) for k in range(8)}

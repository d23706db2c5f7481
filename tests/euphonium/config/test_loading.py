from pathlib import Path

import pytest

from euphonium.config import RunConfig, dump_config, load_config
from tests.euphonium.config.minimal import MINIMAL, failure


def test_reads_recipe_with_defaults_and_plain_exponents(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.optimizer.learning_rate == 1e-4
    assert config.objective.clip_range == 1e-4
    assert config.pools.rollout.num_actors == 1


def test_overrides_reach_nested_keys_lists_and_null(recipe: Path) -> None:
    config = load_config(
        recipe,
        ["pools.rollout.num_actors=3", "rewards.outcome.1.weight=2", "optimizer.learning_rate=3e-5",
         "metrics.prometheus_port=null", "sampler.sde_window=[1, 4]"],
    )  # fmt: skip
    assert config.pools.rollout.num_actors == 3
    assert config.rewards.outcome[1].weight == 2
    assert config.optimizer.learning_rate == 3e-5
    assert config.metrics.prometheus_port is None
    assert config.sampler.sde_window == (1, 4)


def test_a_written_configuration_reads_back_the_same(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["optimizer.eps=1e-15", "sampler.sde_window=[1, 4]"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize("name", ["1e9", "1E5", "1e999", ".5e3", "-1e2", "1:30", "0x1f", "2026-01-01", "null", "e1"])
def test_a_text_that_looks_like_a_number_is_written_as_a_text(recipe: Path, tmp_path: Path, name: str) -> None:
    config = load_config(recipe, [f"model.path='{name}'"])
    assert config.model.path == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_an_unknown_key_is_named_with_line_and_suggestion(recipe: Path) -> None:
    recipe.write_text(MINIMAL.replace("  num_steps: 8", "  num_steps: 8\n  shfit: 3.0"))
    message = failure(recipe)
    assert "recipe.yaml:9" in message
    assert "'sampler.shfit'" in message
    assert "did you mean 'shift'?" in message


def test_an_unknown_override_is_named_with_suggestion(recipe: Path) -> None:
    message = failure(recipe, "pools.rolout.num_actors=3")
    assert "override 'pools.rolout.num_actors=3'" in message
    assert "did you mean 'rollout'?" in message


def test_an_unknown_key_in_a_list_entry_is_suggested(recipe: Path) -> None:
    message = failure(recipe, "rewards.outcome.1.wieght=2")
    assert "did you mean 'weight'?" in message


def test_all_mistakes_come_at_once(recipe: Path) -> None:
    message = failure(recipe, "iterations=0", "rollout.group_size=1", "optimizer.lr=1")
    assert "3 mistakes" in message
    for part in ("iterations", "rollout.group_size", "optimizer.lr"):
        assert part in message


def test_a_missing_key_is_named(recipe: Path) -> None:
    recipe.write_text(MINIMAL.replace("iterations: 3\n", ""))
    assert "'iterations' is missing" in failure(recipe)


def test_a_key_given_twice_is_refused(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "iterations: 5\n")
    assert "recipe.yaml:15: the key 'iterations' is given twice" in failure(recipe)


def test_broken_yaml_is_named_with_its_line(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "metrics: [\n")
    assert "recipe.yaml:16" in failure(recipe)


@pytest.mark.parametrize("override", ["novalue", "=3", "rewards.outcome.7.weight=1", "a.b=[1"])
def test_a_malformed_override_is_refused(recipe: Path, override: str) -> None:
    assert repr(override) in failure(recipe, override)


def test_an_impossible_sampler_is_refused_while_reading(recipe: Path) -> None:
    message = failure(recipe, "sampler.law=sage", "sampler.num_steps=100", "sampler.grid=linear", "sampler.shift=12")
    assert "step 0 of law 'sage'" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.guidance={scale: 0.1}"], "set rewards.process.path"),
        (["sampler.guidance={scale: 0.1, beta: 1}"], "exactly one of scale"),
        (["rewards.outcome.1.name=icon"], "'icon' is taken"),
        (["rewards.outcome.0.weight=0", "rewards.outcome.1.weight=0"], "learn from; give one a weight"),
        (["sampler.sde_window=[-1, 8]"], "(-1, 8) is not a range of the 8 steps 0..7; give its first step"),
        (["objective.updates_per_iteration=5"], "an update would have no group"),
        (
            [
                "advantage.baseline=strength",
                "sampler.guidance={scale: 1, strengths: [0, 1]}",
                "rollout.group_size=3",
                "rewards.process.path=prm",
            ],
            "need groups of at least 4",
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(recipe: Path, overrides: list[str], message: str) -> None:
    assert message in failure(recipe, *overrides)


def test_what_is_no_recipe_is_refused_with_the_line_that_extends_it(recipe: Path) -> None:
    recipe.write_text(f"extends: /dev/null\n{MINIMAL}")
    assert "recipe.yaml:1: extends: /dev/null: a recipe is a mapping of keys to values; give the path" in failure(
        recipe
    )


def test_a_recipe_builds_on_another(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\nsampler: {eta: 0.9}\n")
    config = load_config(child)
    assert (config.sampler.eta, config.sampler.num_steps) == (0.9, 8)
    child.write_text("extends: recipe.yaml\nsampler: {etta: 0.9}\n")
    message = failure(child)
    assert "child.yaml:2" in message
    assert "did you mean 'eta'?" in message


def test_a_mistake_in_a_recipe_that_is_built_on_is_placed_there(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(MINIMAL.replace("  num_steps: 8", "  num_steps: 8\n  shfit: 3.0"))
    middle, child = tmp_path / "middle.yaml", tmp_path / "child.yaml"
    middle.write_text("extends: recipe.yaml\nrollout:\n  group_size: 1\n")
    child.write_text("extends: middle.yaml\nname: child\nmodel:\n  widht: 3\n")
    message = failure(child)
    assert "recipe.yaml:9: unknown key 'sampler.shfit'; did you mean 'shift'?" in message
    assert "middle.yaml:3: rollout.group_size" in message
    assert "child.yaml:4: unknown key 'model.widht'; did you mean 'width'?" in message


def test_a_recipe_replaces_lists_and_whole_sections_by_null(recipe: Path, tmp_path: Path) -> None:
    middle, child = tmp_path / "middle.yaml", tmp_path / "child.yaml"
    middle.write_text("extends: recipe.yaml\nobjective: {kl: {anchor: fixed}}\n")
    child.write_text(
        "extends: middle.yaml\nobjective: {kl: null}\nrewards: {outcome: [{name: a, type: sprite_icon}]}\n"
    )
    config = load_config(child)
    assert config.objective.kl is None
    assert [reward.name for reward in config.rewards.outcome] == ["a"]
    assert load_config(middle).objective.kl is not None


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    message = failure(tmp_path / "a.yaml")
    assert "extends itself" in message
    assert "b.yaml:1: extends: " in message


def test_a_recipe_that_extends_nothing_that_exists_says_which_line_does(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("name: child\nextends: bsae.yaml\n")
    message = failure(child)
    assert "child.yaml:2: extends: cannot read" in message
    assert "bsae.yaml" in message
    child.write_text("extends: [a.yaml, b.yaml]\n")
    assert "child.yaml:1: extends: give the name of one other recipe" in failure(child)


def test_every_field_is_described() -> None:
    def walk(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            kind = field.annotation
            nested = isinstance(kind, type) and hasattr(kind, "model_fields")
            assert nested or field.description, f"{model.__name__}.{name} has no description"
            if nested:
                walk(kind)

    walk(RunConfig)

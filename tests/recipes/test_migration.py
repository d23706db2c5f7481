"""Settings of other projects are answered with their name here, wherever they are given."""

import subprocess
import sys
from pathlib import Path

import pytest

from euphonium.config import PrmConfig, RunConfig, load_config
from euphonium.config.foreign import ForeignName, Project, ineffective_variables, projects
from euphonium.errors import ConfigError
from orchestrator.commands.reference import fields

RECIPE = Path("recipes/embedded/dancegrpo.yaml")
FIELDS = {field.path for field in fields(RunConfig)}
ENTRIES = [entry for project in projects().values() for entry in project.names]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(RECIPE, overrides)
    return str(caught.value)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_names_fields_that_exist_or_says_why_there_is_none(entry: ForeignName) -> None:
    assert set(entry.fields) <= FIELDS
    assert entry.fields or entry.note


@pytest.mark.parametrize("project", projects().values(), ids=lambda project: project.title)
def test_names_are_listed_once(project: Project) -> None:
    names = [entry.name for entry in project.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_override_by_a_foreign_name_is_refused_with_ours(entry: ForeignName) -> None:
    message = refusal(f"{entry.name}=1")
    assert f"override '{entry.name}=1'" in message
    assert entry.name in message
    expected = set().union(*(set(e.fields) for e in ENTRIES if e.name.lower() == entry.name.lower()))
    assert not expected or any(field in message for field in expected)


def test_the_form_does_not_matter() -> None:
    for name in (
        "PROCESS_LATENT_REWARD_GUIDANCE_SCALE", "process_latent_reward_guidance_scale",
        "process-latent-reward-guidance-scale",
    ):  # fmt: skip
        assert f"{name} of Euphonium is sampler.guidance.scale here" in refusal(f"{name}=0.01")
    assert "config.train.beta of Flow-GRPO and Flow-CPS is objective.kl.weight here" in refusal(
        "config.train.beta=0.04"
    )


def test_a_key_in_a_recipe_is_refused_with_file_and_line(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {RECIPE.resolve()}\nname: mine\nsample:\n  noise_level: 0.7\n  num_steps: 10\n")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    message = str(caught.value)
    assert "mine.yaml:3: unknown key 'sample'" in message
    assert "sample.noise_level of Flow-GRPO and Flow-CPS is sampler.eta here" in message
    assert "sample.num_steps of Flow-GRPO and Flow-CPS is sampler.num_steps here" in message


def test_a_name_in_another_place_gets_both_readings() -> None:
    message = refusal("sampler.noise_level=0.7")
    assert "sample.noise_level of Flow-GRPO and Flow-CPS is sampler.eta here" in message
    message = refusal("optimizer.learning_rat=1")
    assert "did you mean 'learning_rate'?" in message
    assert "DanceGRPO" not in message


def test_a_field_of_ours_with_a_foreign_name_stays_ours() -> None:
    assert load_config(RECIPE, ["sampler.eta=0.4", "sampler.shift=2"]).sampler.eta == 0.4


def test_names_mean_nothing_for_other_recipes() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("recipes/embedded/prm.yaml", ["num_generations=3"], PrmConfig)
    assert "rollout.group_size" not in str(caught.value)


def test_variables_of_the_environment_are_found_by_their_exact_name() -> None:
    environment = {"PROCESS_LATENT_REWARD_START_STEP": "12", "lr": "1", "HOME": "/", "TRL_USE_RICH": "0"}
    (only,) = ineffective_variables(environment)
    assert only.startswith("PROCESS_LATENT_REWARD_START_STEP=12 is sampler.guidance.window here")


def test_validate_refuses_variables_that_would_have_no_effect() -> None:
    import os

    result = subprocess.run(
        [sys.executable, "-m", "orchestrator", "validate", str(RECIPE)],
        env={**os.environ, "PROCESS_LATENT_REWARD_GUIDANCE_SCALE": "0.1", "USE_KL_LOSS": "true"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "PROCESS_LATENT_REWARD_GUIDANCE_SCALE=0.1 is sampler.guidance.scale here" in result.stderr
    assert "USE_KL_LOSS=true is objective.kl here" in result.stderr


def test_the_tables_hold_what_the_released_scripts_set() -> None:
    names = {key: {entry.name for entry in project.names} for key, project in projects().items()}
    assert names["euphonium"] >= {"PROCESS_REWARD_ADVANTAGE_MODE", "SPSA_REWARD_ENABLED", "KL_COEF"}
    assert names["dance_grpo"] >= {"eta", "bestofn", "cfg_infer", "timestep_fraction"}
    assert names["flow_grpo"] >= {"sample.noise_level", "train.beta", "sample.global_std"}

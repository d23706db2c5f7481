"""Every shipped recipe fits, and its line in the docs is current."""

from pathlib import Path

import pytest

from euphonium.config import load_config
from orchestrator.plan.pages import BEGIN, END, HEAD, PAGE, plan_of, recipes, row

# Those whose networks are run once a group of recipes; the others take half a minute each.
QUICK = {
    "hunyuan-video/euphonium.yaml",
    "stable-diffusion-1.4/dancegrpo.yaml",
    "wan-2.1/one-gpu-24.yaml",
}


def table() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def test_the_table_has_a_line_for_every_recipe() -> None:
    lines = table().removeprefix(HEAD).splitlines()
    assert [line.split("`")[1] for line in lines] == [str(recipe.relative_to("recipes")) for recipe in recipes()]


@pytest.mark.parametrize("recipe", [path for path in recipes() if path.stem.startswith("one-")], ids=str)
def test_a_recipe_of_one_machine_has_its_evidence_in_the_docs_and_shares_its_gpus(recipe: Path) -> None:
    config = load_config(recipe)
    text = (PAGE.parent / "models.md").read_text(encoding="utf-8")
    assert f"`{recipe.relative_to('recipes')}`" in text or f"`{recipe.name}`" in text
    pools = config.pools
    shares = [pools.rollout, pools.orm, pools.learner, *([pools.prm] if config.rewards.process else [])]
    assert all(0 < share.num_gpus < 1 for share in shares)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, marks=() if str(path.relative_to("recipes")) in QUICK else pytest.mark.slow)
        for path in recipes()
    ],
    ids=str,
)
def test_a_recipe_fits_and_its_line_is_current(recipe: Path) -> None:
    plan = plan_of(recipe)
    assert not plan.problems
    assert row(recipe, plan) in table(), "run python -m orchestrator.plan.pages"

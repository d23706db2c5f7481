"""Recipes and overrides that break YAML, numbers and paths: one line each, and nothing else."""

from pathlib import Path

import pytest

from euphonium.config import OrmConfig, load_config
from euphonium.config.sampling import SpsaConfig
from euphonium.errors import ConfigError
from tests.euphonium.config.minimal import MINIMAL, failure


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.eta=.nan", "sampler.eta"),
        ("sampler.eta=.inf", "numbers of a recipe are finite"),
        ("sampler.eta=1e999", "numbers of a recipe are finite"),
        ("sampler.eta='nan'", "sampler.eta: input should be a finite number"),
        ("rewards.deadline_s='inf'", "rewards.deadline_s: input should be a finite number"),
        ("model.cfg_scale='nan'", "model.cfg_scale: input should be a finite number"),
        ("rewards.outcome.0.weight='-inf'", "finite number"),
        ("rewards.outcome.0.options={scale: .nan}", "numbers of a recipe are finite"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("evaluation.seed=-1", "evaluation.seed"),
        ("sampler.sde_window={kind: random, size: 1, allowed: [0, 2], seed: -3}", "seed"),
        ("seed=99999999999999999999", "more than 64 bits"),
        ("seed='99999999999999999999'", "seed: input should be less than"),
        (f"seed={'9' * 5000}", "no readable value"),
        (f"seed=0x{'f' * 5000}", "more than 64 bits"),
        ("seed=9223372036854775808.0", "seed: input should fit into 64 bits"),
        ("sampler.num_steps=1000000000", "less than or equal to 10000"),
        ("pools.learner.num_gpus=0.5", "NCCL refuses two ranks there"),
        ("pools.learner.num_gpus=2", "more than half of one"),
        ("pools.rollout.num_gpus=1.5", "parts of one GPU, or several whole ones"),
        ("pools.rollout.resources={GPU: 1}", "num_gpus"),
        ('name="\\ud800"', "half of a character"),
        ("name=\udcff", "not UTF-8"),
        ("rewards.outcome.²=1", "is not an entry of the list"),
        ("rewards=&x [*x]", "contains itself"),
        ("rewards=&x {a: *x}", "contains itself"),
        ("rewards=&x {<<: *x}", "contains itself"),
        ("rewards=" + "[" * 200 + "]" * 200, "nested too deeply"),
        ("rewards=" + "[" * 100_000, "nested too deeply"),
        ("rewards=!!python/name:os.system x", "recipes have no tags"),
        ("rewards=!!set {a}", "recipes have no tags"),
        ("rewards=!!int x", "no readable value"),
        ("rewards=!!bool x", "no readable value"),
        ("rewards={[a]: 1}", "keys are names"),
        ("rewards={a: 1, a: 2}", "given twice"),
        ("rewards={<<: 3}", "takes a mapping"),
        ("output_dir=~nobody-of-this-name/x", "no home folder"),
        ('output_dir="a\\0b"', "cannot hold a NUL character"),
        ('output_dir="a\\nb"', "a path with a line break"),
        (f"prompts.train={'x' * 300}", "prompts.train: too long"),
        (f"model.path={'x/' * 3000}", "model.path: too long"),
        ("advantage.best_of=1 ", ""),
    ],
)  # fmt: skip
def test_hostile_values_are_refused_in_one_line(recipe: Path, override: str, message: str) -> None:
    if not message:
        assert load_config(recipe, [override]).advantage.best_of == 1
        return
    text = failure(recipe, override)
    assert message in text
    assert len(text.splitlines()) <= 2
    assert max(map(len, text.splitlines())) < 900


def test_many_aliases_of_aliases_do_not_take_all_memory(recipe: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    recipe.write_text("\n".join(lines))
    assert "aliases make more than" in failure(recipe)


def test_merge_keys_merge_and_own_keys_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        MINIMAL.replace(
            "prompts: {train: a.txt, evaluation: b.txt}",
            "prompts: &p {train: a.txt, evaluation: b.txt}\n"
            "evaluation: &one {every: 2, num_steps: 4}\n"
            "checkpoint: &two {every: 3, keep_last: 7}",
        )
        + "pools:\n  rollout: &actors {num_actors: 2, threads: 3}\n"
        "  orm: {threads: 5, <<: *actors}\n"
        "  prm: {<<: [{num_actors: 4}, *actors], max_batch: 2}\n"
    )
    config = load_config(recipe)
    assert (config.pools.orm.num_actors, config.pools.orm.threads) == (2, 5)
    assert (config.pools.prm.num_actors, config.pools.prm.threads, config.pools.prm.max_batch) == (4, 3, 2)
    recipe.write_text(recipe.read_text().replace("threads: 3}", "threads: 3, nonsense: 1}"))
    message = failure(recipe)
    assert "unknown key 'pools.orm.nonsense'" in message
    assert message.count("nonsense") == 3


def test_a_value_merged_and_replaced_leaves_no_trace(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: &x {k: [1, 2]}\nb: {<<: *x, k: {z: 1}}\n")
    from euphonium.config.yaml_files import parse_yaml

    values, places = parse_yaml(recipe.read_text(), "r", lines=True)
    assert values == {"a": {"k": [1, 2]}, "b": {"k": {"z": 1}}}
    assert ("b", "k", 0) not in places
    assert places["b",] == "r:2"


def test_dates_and_quoted_texts_stay_texts(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL.replace("name: demo", "name: 2026-01-31"))
    assert load_config(recipe).name == "2026-01-31"
    recipe.write_text(MINIMAL.replace("name: demo", 'name: "1e4"'))
    assert load_config(recipe).name == "1e4"
    assert load_config(recipe, ['name="1e5"']).name == "1e5"


def test_a_recipe_may_begin_with_a_byte_order_mark(recipe: Path) -> None:
    recipe.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(recipe).name == "demo"
    recipe.write_bytes(MINIMAL.encode() + b"# \xff")
    assert "recipe.yaml is not UTF-8: byte" in failure(recipe)


def test_home_is_expanded_in_every_path(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = ("output_dir", "model.path", "prompts.train", "prompts.evaluation", "resume")
    config = load_config(recipe, [*(f"{field}=~/x" for field in fields), "rewards.process={path: ~/x}"])
    found = [config.output_dir, config.model.path, config.prompts.train, config.prompts.evaluation, config.resume]
    assert config.rewards.process is not None
    assert [str(path) for path in (*found, config.rewards.process.path)] == [str(tmp_path / "x")] * 6
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: ~/{recipe.name}\nname: child\n")
    assert load_config(child).name == "child"
    orm = tmp_path / "orm.yaml"
    orm.write_text(
        "{name: o, target: ~/t, model: {path: ~/m}, preferences: {train: ~/p.jsonl, held_out: ~/h.jsonl}, "
        "optimizer: {updates: 1}}"
    )
    trained = load_config(orm, (), OrmConfig)
    assert (trained.target, trained.model.path) == (tmp_path / "t", str(tmp_path / "m"))
    assert (trained.preferences.train, trained.preferences.held_out) == (tmp_path / "p.jsonl", tmp_path / "h.jsonl")


@pytest.mark.parametrize("path", [".", "none.yaml", "x" * 300, "a\0b", "/dev/null"])
def test_a_recipe_that_cannot_be_read_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path)[:30] in str(refused.value) or path == "/dev/null"


def test_values_that_were_not_read_from_a_file_are_finite_too() -> None:
    with pytest.raises(ValueError, match="finite"):
        SpsaConfig(scale=float("inf"))

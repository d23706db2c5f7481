"""Recipes and overrides: whatever is in them, they are read, or refused in a way that helps."""

import copy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from euphonium.config import OrmConfig, PrmConfig, RunConfig, dump_config, load_config
from orchestrator.commands.launch import preflight
from tests.fuzz.harness import fuzz, taken_or_refused
from tests.fuzz.values import FIELDS, KEYS, OVERRIDES, RAW, TEXT, VALUES, entries

EMBEDDED = sorted(Path("recipes/embedded").glob("*.yaml"))
KINDS = (RunConfig, PrmConfig, OrmConfig)
MODELS = st.sampled_from(KINDS)
TOKENS = st.one_of(
    st.sampled_from(
        ["name", "model", "rewards", "extends", ": ", ":", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "&a ",
         "*a", "<<",
         "!!int ", "? ", "| ", "# ", "'", '"', "\t", "---\n", "\r", "\x85", "\u2028", "base.yaml"]
    ),
    RAW,
)  # fmt: skip


def whole(model: type[Any]) -> dict[str, Any]:
    """All values of a shipped recipe of this kind."""
    path = Path("recipes/embedded") / ("prm.yaml" if model is not RunConfig else "euphonium.yaml")
    if model is OrmConfig:
        return {
            "name": "orm", "target": "model", "model": {"path": "somewhere"}, "preferences": {"train": "p.jsonl"},
            "optimizer": {"updates": 10},
        }  # fmt: skip
    tree: dict[str, Any] = yaml.safe_load(dump_config(load_config(path, (), model)))
    return tree


WHOLE = {model: whole(model) for model in KINDS}


def read(recipe: Path, overrides: list[str], model: type[Any], folder: Path) -> None:
    config = taken_or_refused(lambda: load_config(recipe, overrides, model), [str(recipe), "override"], folder)
    if config is not None:
        # What is read can be written, and read again.
        copied = folder / "copy.yaml"
        copied.write_text(dump_config(config), encoding="utf-8")
        assert load_config(copied, (), model) == config
        copied.unlink()


def written(folder: Path, data: bytes) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(data)
    return recipe


@fuzz()
@given(data=st.binary(max_size=200), model=MODELS)
def test_any_bytes(data: bytes, model: type[Any], tmp_path: Path) -> None:
    read(written(tmp_path, data), [], model, tmp_path)


@fuzz()
@given(tokens=st.lists(TOKENS, max_size=25), model=MODELS)
def test_texts_that_look_like_yaml(tokens: list[str], model: type[Any], tmp_path: Path) -> None:
    read(written(tmp_path, "".join(tokens).encode()), [], model, tmp_path)


@fuzz()
@given(data=st.data(), model=MODELS)
def test_values_of_shipped_recipes_that_were_changed(data: st.DataObject, model: type[Any], tmp_path: Path) -> None:
    tree = copy.deepcopy(WHOLE[model])
    for _ in range(data.draw(st.integers(1, 3))):
        change(tree, data)
    read(written(tmp_path, yaml.safe_dump(tree).encode()), [], model, tmp_path)


def change(tree: Any, data: st.DataObject) -> None:
    """Replaces, removes, renames or adds an entry somewhere."""
    path = data.draw(st.sampled_from(entries(tree)))
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    kind = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
    if kind == "replace":
        inside[path[-1]] = data.draw(VALUES)
    elif isinstance(inside, list):
        inside.append(data.draw(VALUES))
    elif kind == "add":
        inside[data.draw(TEXT)] = data.draw(VALUES)
    else:
        value = inside.pop(path[-1])
        if kind == "rename":
            inside[data.draw(TEXT)] = value
    if not entries(tree):
        tree["name"] = "x"


@fuzz()
@given(data=st.data(), recipe=st.sampled_from(EMBEDDED))
def test_lines_of_shipped_recipes_that_were_changed(data: st.DataObject, recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text()
    lines = text.replace("extends: ", f"extends: {recipe.parent.resolve()}/").split("\n")
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        line, place = lines[number], data.draw(st.integers(0, 40))
        lines[number] = data.draw(
            st.sampled_from([line[:place], "  " + line, line.strip(), line + "\n" + line, "", line.replace(":", "")])
            | RAW.map(lambda raw, line=line, place=place: line[:place] + raw + line[place:])
            | RAW.map(lambda raw, line=line: line.partition(":")[0] + ": " + raw)
        )
    model = PrmConfig if recipe.name == "prm.yaml" else RunConfig
    read(written(tmp_path, "\n".join(lines).encode()), [], model, tmp_path)


@fuzz()
@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_overrides(overrides: list[str], tmp_path: Path) -> None:
    recipe = Path("recipes/embedded/euphonium.yaml")
    read(recipe, overrides, RunConfig, tmp_path)


@fuzz(0.1)
@given(key=KEYS, raw=RAW)
def test_recipes_that_can_be_read_can_be_planned(key: str, raw: str, tmp_path: Path) -> None:
    recipe = Path("recipes/embedded/euphonium.yaml")
    place = f"output_dir={tmp_path / 'runs'}"
    config = taken_or_refused(lambda: load_config(recipe, [f"{key}={raw}", place]), [str(recipe), "override"], tmp_path)
    if config is not None:
        names = [str(tmp_path), *(name for field in FIELDS for name in (field, field.replace(".0.", " (")))]
        taken_or_refused(lambda: preflight(config), names, tmp_path)

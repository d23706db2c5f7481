"""Reads recipes: YAML files that may extend each other, ``a.b=c`` overrides, and errors with file and line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from euphonium.config import foreign as foreign_names
from euphonium.config.base import user_path
from euphonium.config.explain import Mistake, explain, mistakes
from euphonium.config.reward_training import OrmConfig, PrmConfig
from euphonium.config.run import RunConfig
from euphonium.config.yaml_files import KeyPath, dump_yaml, parse_yaml
from euphonium.errors import ConfigError
from euphonium.text_files import has_surrogates, quoted, read_text, shown

_C = TypeVar("_C", bound=BaseModel)


OPTIONS = "`euphonium options` lists all fields"


class _Source:
    """The merged values of a recipe and its overrides, with the file and line that each of them comes from."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.places: dict[KeyPath, str] = {}

    def place(self, path: KeyPath) -> str:
        """File and line of a value, or of its nearest parent that has one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return next(iter(self.places.values()), "")

    def read(self, file: Path, seen: tuple[Path, ...] = (), wanted_by: str = "") -> None:
        """Reads a recipe; the one that it extends is read first.

        Args:
            file: the recipe.
            seen: recipes that extend it, directly or not.
            wanted_by: file and line that name it, as the beginning of an error.
        """
        file = Path(os.path.realpath(file))
        if file in seen:
            chain = " -> ".join(map(_shown, (*seen, file)))
            raise ConfigError(f"{wanted_by}the recipe extends itself: {chain}")
        text = read_text(file, wanted_by.removesuffix(": "))
        values, places = parse_yaml(text, _shown(file), lines=True)
        if not isinstance(values, dict):
            what = "a recipe is a mapping of keys to values; give the path of a recipe"
            raise ConfigError(f"{wanted_by}{_shown(file)}: {what}")
        base = values.pop("extends", None)
        if base is not None:
            where = f"{places[('extends',)]}: extends: "
            if not isinstance(base, str):
                raise ConfigError(f"{where}give the name of one other recipe, got {quoted(base)}")
            self.read(file.parent / user_path(base, where.removesuffix(": ")), (*seen, file), where)
        _merge(self.values, values)
        self.places.update(places)

    def override(self, text: str) -> None:
        """Applies one ``a.b=c``; the value is parsed as YAML, so numbers, lists and null work."""
        key, separator, raw = text.partition("=")
        where = f"override {quoted(text)}"
        if not separator or not key:
            raise ConfigError(f"{where} is not of the form key.subkey=value")
        if has_surrogates(text):
            raise ConfigError(f"{where} is not UTF-8; write it in UTF-8")
        value, _ = parse_yaml(raw, where, lines=False)
        path: KeyPath = tuple(map(_part, key.split(".")))
        target: object = self.values
        for depth, part in enumerate(path[:-1], start=1):
            target = _entered(target, part)
            if target is None:
                raise ConfigError(f"{where}: there is no {shown('.'.join(map(str, path[:depth])))}; {OPTIONS}")
        if not _put(target, path[-1], value):
            raise ConfigError(f"{where}: {shown(key)} is not an entry of the list; {OPTIONS}")
        self.places = {p: w for p, w in self.places.items() if p[: len(path)] != path}
        for length in range(1, len(path) + 1):
            self.places.setdefault(path[:length], where)


def _part(text: str) -> str | int:
    """A part of an override's key: the number of a list's entry, or a name."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text


def _entered(target: object, part: str | int) -> object:
    """The value under one part of an override's key, created as an empty section if missing; None if impossible."""
    if isinstance(target, list):
        return target[part] if isinstance(part, int) and part < len(target) else None
    if not isinstance(target, dict):
        return None
    if not isinstance(target.get(part), dict | list):
        target[part] = {}
    return target[part]


def _put(target: object, part: str | int, value: object) -> bool:
    """Sets the value under the last part of an override's key; returns whether that was possible."""
    if isinstance(target, dict):
        target[part] = value
        return True
    if isinstance(target, list) and isinstance(part, int) and part < len(target):
        target[part] = value
        return True
    return False


def load_config(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    model: type[_C] = RunConfig,  # type: ignore[assignment]  # mypy knows no default of a type variable
) -> _C:
    """Reads and validates a recipe.

    Args:
        recipe: YAML file. Its key ``extends`` may name another recipe, relative to it, whose values it inherits.
        overrides: ``a.b=c`` settings, applied in order; list entries go by number (``rewards.outcome.0.weight=2``).
        model: the configuration class that the recipe describes.

    Raises:
        ConfigError: lists all mistakes, each with file and line, the key, what is wrong, and the nearest known key for
            an unknown one.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from euphonium.config.sampling import SpsaConfig
        >>> folder = TemporaryDirectory()
        >>> recipe = Path(folder.name) / "recipe.yaml"
        >>> _ = recipe.write_text("perturbations: 4")
        >>> load_config(recipe, ["scale=0.1"], SpsaConfig)
        SpsaConfig(perturbations=4, scale=0.1)
        >>> try:
        ...     load_config(recipe, ["scales=0.1"], SpsaConfig)
        ... except ConfigError as error:
        ...     print(str(error).splitlines()[-1].strip())
        override 'scales=0.1': unknown key 'scales'; did you mean 'scale'?
    """
    return _validated(_merged(recipe, overrides), recipe, model)


def load_any_config(recipe: Path | str, overrides: Sequence[str] = ()) -> RunConfig | PrmConfig | OrmConfig:
    """Reads and validates a recipe of any command, which its sections tell.

    Args:
        recipe: YAML file.
        overrides: ``a.b=c`` settings.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    source = _merged(recipe, overrides)
    keys = set(source.values)
    model = source.values.get("model")
    # The trainings of reward models alone write to a target; only that of an outcome reward model has no generator.
    if "target" not in keys:
        return _validated(source, recipe, RunConfig)
    generates = isinstance(model, dict) and {"height", "width"} & set(model)
    if generates or keys & (set(PrmConfig.model_fields) - set(OrmConfig.model_fields)):
        return _validated(source, recipe, PrmConfig)
    return _validated(source, recipe, OrmConfig)


def _merged(recipe: Path | str, overrides: Sequence[str]) -> _Source:
    source = _Source()
    source.read(user_path(recipe))
    for text in overrides:
        source.override(text)
    return source


def _validated(source: _Source, recipe: Path | str, model: type[_C]) -> _C:
    try:
        return model.model_validate(source.values)
    except ValidationError as error:
        lines = [_explain(model, source, mistake) for mistake in mistakes(error.errors(), source.values)]
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise ConfigError(f"{count} in {recipe}:\n  " + "\n  ".join(lines)) from None


def dump_config(config: BaseModel) -> str:
    """The whole tree, defaults included, as YAML that :func:`load_config` reads back."""
    return dump_yaml(config.model_dump(mode="json"))


def _explain(model: type[BaseModel], source: _Source, mistake: Mistake) -> str:
    """One error with its file and line; for another project's setting it says what that is called here."""
    path = mistake.path
    place = source.place(path)
    if mistake.kind != "extra_forbidden" or model is not RunConfig:
        return f"{place}: {explain(model, mistake)}"
    key = ".".join(map(str, path))
    if known_elsewhere := foreign_names.advice(path, mistake.given):
        return f"{place}: unknown key {key!r}; {'; '.join(known_elsewhere)}"
    similar = foreign_names.similar(str(path[-1]))
    return f"{place}: {explain(model, mistake)}" + (f"; {similar}" if similar else "")


def _merge(base: dict[str, object], upper: Mapping[str, object]) -> None:
    for key, value in upper.items():
        held = base.get(key)
        if isinstance(value, dict) and isinstance(held, dict):
            _merge(held, value)
        else:
            base[key] = value


def _shown(file: Path) -> str:
    """The path as a user would write it: relative if it is below the working directory."""
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)

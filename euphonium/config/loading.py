"""Reads recipes: YAML files that may extend each other, ``a.b=c`` overrides, and errors with file and line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from euphonium.config import foreign as foreign_names
from euphonium.config.explain import explain, path_of
from euphonium.config.run import RunConfig
from euphonium.errors import ConfigError

_C = TypeVar("_C", bound=BaseModel)
_Path = tuple[str | int, ...]


class _Source:
    """The merged values of a recipe and its overrides, with the file and line that each of them comes from."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.places: dict[_Path, str] = {}

    def place(self, path: _Path) -> str:
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
        file = file.resolve()
        if file in seen:
            chain = " -> ".join(map(_shown, (*seen, file)))
            raise ConfigError(f"{wanted_by}the recipe extends itself: {chain}")
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{wanted_by}cannot read the recipe {_shown(file)}: {error.strerror}") from error
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{_shown(file)}:{mark.line + 1}" if mark else _shown(file)
            raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{_shown(file)}: a recipe is a mapping of keys to values")
        places: dict[_Path, str] = {}
        values = _mapping(node, file, (), places)
        base = values.pop("extends", None)
        if base is not None:
            where = f"{places[('extends',)]}: extends: "
            if not isinstance(base, str):
                raise ConfigError(f"{where}the name of one other recipe, got {base!r}")
            self.read(file.parent / base, (*seen, file), where)
        _merge(self.values, values)
        self.places.update(places)

    def override(self, text: str) -> None:
        """Applies one ``a.b=c``; the value is parsed as YAML, so numbers, lists and null work."""
        key, separator, raw = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {text!r} is not of the form key.subkey=value")
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r}: the value is not valid YAML") from error
        # YAML 1.1 reads 1e-4 as a string; everybody means the number.
        if isinstance(value, str):
            value = _as_number(value)
        path: _Path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        target: object = self.values
        for depth, part in enumerate(path[:-1], start=1):
            target = _entered(target, part)
            if target is None:
                raise ConfigError(f"override {text!r}: there is no {'.'.join(map(str, path[:depth]))}")
        if not _put(target, path[-1], value):
            raise ConfigError(f"override {text!r}: {key} is not an entry of the list")
        self.places = {p: w for p, w in self.places.items() if p[: len(path)] != path}
        for length in range(1, len(path) + 1):
            self.places.setdefault(path[:length], f"override {text!r}")


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
    source = _Source()
    source.read(Path(recipe))
    for text in overrides:
        source.override(text)
    try:
        return model.model_validate(source.values)
    except ValidationError as error:
        lines = [_explain(model, source, item) for item in error.errors()]
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise ConfigError(f"{count} in {recipe}:\n  " + "\n  ".join(lines)) from None


def dump_config(config: BaseModel) -> str:
    """The whole tree, defaults included, as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(model: type[BaseModel], source: _Source, item: ErrorDetails) -> str:
    """One error with its file and line; for another project's setting it says what that is called here."""
    path = path_of(item)
    place = source.place(path)
    if item["type"] != "extra_forbidden" or model is not RunConfig:
        return f"{place}: {explain(model, item)}"
    key = ".".join(map(str, path))
    if known_elsewhere := foreign_names.advice(path, item["input"]):
        return f"{place}: unknown key {key!r}; {'; '.join(known_elsewhere)}"
    similar = foreign_names.similar(str(path[-1]))
    return f"{place}: {explain(model, item)}" + (f"; {similar}" if similar else "")


def _mapping(node: yaml.MappingNode, file: Path, path: _Path, places: dict[_Path, str]) -> dict[str, object]:
    """The values of a mapping by key; records file and line of every key in ``places``."""
    places[path] = f"{_shown(file)}:{node.start_mark.line + 1}"
    result: dict[str, object] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in result:
            raise ConfigError(f"{_shown(file)}:{key_node.start_mark.line + 1}: the key {key!r} is given twice")
        result[key] = _construct(value_node, file, (*path, key), places)
        places[(*path, key)] = f"{_shown(file)}:{key_node.start_mark.line + 1}"
    return result


def _construct(node: yaml.Node, file: Path, path: _Path, places: dict[_Path, str]) -> object:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, file, path, places)
    places[path] = f"{_shown(file)}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, file, (*path, i), places) for i, item in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return _as_number(value) if plain and isinstance(value, str) else value


def _as_number(text: str) -> str | float:
    if text[:1] in "+-.0123456789" and "e" in text.lower():
        try:
            return float(text)
        except ValueError:
            return text
    return text


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

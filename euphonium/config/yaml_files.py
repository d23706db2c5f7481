"""YAML as plain values, with the line of each of them: what the loader of recipes builds on.

YAML 1.1 without its surprises: a number with an exponent is a number, a date is the text that was written, a value
that contains itself is refused, and so is a number that no field can hold. Merge keys (``<<``) work as in YAML 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import yaml
from typing_extensions import override

from euphonium.errors import ConfigError
from euphonium.text_files import has_surrogates, quoted, shown

KeyPath = tuple[str | int, ...]

# Values of one recipe, those that aliases repeat counted each time.
MOST_VALUES = 100_000
DEEPEST = 100
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}
# What YAML 1.1 would make something of that no recipe wants: it stays text.
_TEXTS = {_TAG + name for name in ("timestamp", "value", "merge")}


def parse_yaml(text: str, where: str, *, lines: bool) -> tuple[object, dict[KeyPath, str]]:
    """The value of a YAML document, and the place of each value in it.

    Args:
        text: the document.
        where: what it is, for places and errors: the name of a file.
        lines: whether places say the line, too.

    Raises:
        ConfigError: not valid YAML, or a value that no recipe can hold; names the place.
    """
    reader = _Reader(where, lines)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{reader.at(mark)}: not valid YAML: {shown(problem)}; correct it") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply; a recipe has at most {DEEPEST} levels") from error
    return (None if node is None else reader.value(node, ())), reader.places


def dump_yaml(value: object) -> str:
    """YAML that :func:`parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True)


class _Writer(yaml.SafeDumper):
    """Quotes the texts that PyYAML takes for texts, and the reader for numbers: ``'1e9'``."""

    @override
    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if isinstance(as_number(data), str) else "'"
        return self.represent_scalar(_TAG + "str", data, style=style)


_Writer.add_representer(str, _Writer.represent_str)


class _Reader:
    """Turns nodes into values."""

    def __init__(self, where: str, lines: bool) -> None:
        self._where, self._lines = where, lines
        self._open: list[yaml.Node] = []
        self._count = 0
        self.places: dict[KeyPath, str] = {}

    def at(self, mark: yaml.Mark | None) -> str:
        return f"{self._where}:{mark.line + 1}" if self._lines and mark is not None else self._where

    def value(self, node: yaml.Node, path: KeyPath) -> object:
        place = self.places[path] = self.at(node.start_mark)
        self._count += 1
        if self._count > MOST_VALUES:
            raise ConfigError(f"{place}: aliases make more than {MOST_VALUES} values of this; use fewer")
        if any(node is outer for outer in self._open):
            raise ConfigError(f"{place}: {_key(path)} contains itself, by an alias; write it out")
        if len(self._open) >= DEEPEST:
            raise ConfigError(f"{place}: nested too deeply; a recipe has at most {DEEPEST} levels")
        self._open.append(node)
        try:
            return self._value(node, path, place)
        finally:
            self._open.pop()

    def _value(self, node: yaml.Node, path: KeyPath, place: str) -> object:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, path, place)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        raise ConfigError(f"{place}: {_key(path)} has the tag {shown(node.tag)}; recipes have no tags, leave it out")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        result: dict[str, object] = {}
        own: set[str] = set()
        for key_node, _ in node.value:
            place = self.at(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key of {_key(path)} is a list or a mapping; keys are names")
            key = str(key_node.value)
            if key in own:
                raise ConfigError(f"{place}: the key {quoted(key)} is given twice; leave one out")
            own.add(key)
            _refuse_surrogates(key, place)
        # Merged values first, so that the mapping's own come over them.
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for merged in reversed(list(self._merged(value_node, path))):
                    result |= self._mapping_of(merged, path)
        for key_node, value_node in node.value:
            if key_node.tag != _TAG + "merge":
                key = str(key_node.value)
                if key in result:
                    self._forget((*path, key))
                result[key] = self.value(value_node, (*path, key))
                self.places[(*path, key)] = self.at(key_node.start_mark)
        return result

    def _merged(self, node: yaml.Node, path: KeyPath) -> Iterator[yaml.MappingNode]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for item in items:
            if not isinstance(item, yaml.MappingNode):
                raise ConfigError(
                    f"{self.at(item.start_mark)}: '<<' of {_key(path)} takes a mapping, or a list of mappings"
                )
            yield item

    def _mapping_of(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        place = self.places[path]
        value = self.value(node, path)
        self.places[path] = place
        assert isinstance(value, dict)
        return value

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]


def _scalar(node: yaml.ScalarNode, path: KeyPath, place: str) -> object:
    if node.tag in _TEXTS:
        return str(node.value)
    if node.tag not in _SCALARS:
        raise ConfigError(f"{place}: {_key(path)} has the tag {shown(node.tag)}; recipes have no tags, leave it out")
    loader = yaml.SafeLoader("")
    try:
        value: object = loader.construct_object(node, deep=True)
    except (ValueError, LookupError) as error:
        # An explicit tag that the text does not fit, or an integer of thousands of digits.
        raise ConfigError(f"{place}: {_key(path)} is no readable value: {quoted(node.value)}; correct it") from error
    finally:
        loader.dispose()
    if isinstance(value, str) and node.style is None:
        value = as_number(value)
    return checked(value, path, place)


def checked(value: object, path: KeyPath, place: str) -> object:
    """The value itself.

    Raises:
        ConfigError: a number that is not finite, or has more than 64 bits; a text that cannot be written to a file.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: {_key(path)} is {value}; numbers of a recipe are finite")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{place}: {_key(path)} is an integer of more than 64 bits; give a smaller one")
    if isinstance(value, str):
        _refuse_surrogates(value, place)
    return value


def as_number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as a text; everybody means the number."""
    if text[:1] in "+-.0123456789" and "e" in text.lower():
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _refuse_surrogates(text: str, place: str) -> None:
    if has_surrogates(text):
        raise ConfigError(f"{place}: {quoted(text)} holds half of a character; write the character itself")


def _key(path: KeyPath) -> str:
    return shown(".".join(map(str, path))) if path else "the recipe"

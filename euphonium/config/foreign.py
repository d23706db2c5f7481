"""What settings of other projects are called here, so that a setting copied from one of them is never ignored.

The tables are in ``foreign.yaml``. ``docs/migration.md`` is generated from them, the loader looks unknown keys up in
them, and ``euphonium validate`` finds environment variables that would have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class ForeignName:
    """One setting of another project.

    Attributes:
        name: the setting's name in that project.
        fields: the recipe fields that replace it; empty if there is no counterpart.
        note: how values translate, or why there is no counterpart.
    """

    name: str
    fields: tuple[str, ...] = ()
    note: str = ""

    @property
    def advice(self) -> str:
        """What to use instead, as a clause that follows the setting's name."""
        if not self.fields:
            return f"has no counterpart here: {self.note}"
        return f"is {' and '.join(self.fields)} here" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Project:
    """A project and its settings.

    Attributes:
        title: the project's name.
        kind: what its settings are: command-line options, environment variables.
        names: the settings.
    """

    title: str
    kind: str
    names: tuple[ForeignName, ...]


@lru_cache(maxsize=1)
def projects() -> Mapping[str, Project]:
    """The tables of ``foreign.yaml`` by their keys there: ``euphonium``, ``dance_grpo``, ``flow_grpo``."""
    held = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text(encoding="utf-8"))
    return {
        key: Project(entry["title"], entry["kind"], tuple(map(_name, entry["names"]))) for key, entry in held.items()
    }


def _name(row: Mapping[str, str | list[str]]) -> ForeignName:
    return ForeignName(str(row["name"]), tuple(row.get("fields", ())), str(row.get("note", "")))


@lru_cache(maxsize=1)
def _index() -> tuple[dict[str, tuple[Project, ForeignName]], dict[str, tuple[Project, ForeignName]]]:
    """Settings by normalised name, and by the last part of their dotted name."""
    whole: dict[str, tuple[Project, ForeignName]] = {}
    last: dict[str, tuple[Project, ForeignName]] = {}
    for project in projects().values():
        for entry in project.names:
            name = _normal(entry.name)
            whole.setdefault(name, (project, entry))
            last.setdefault(name.rpartition(".")[2], (project, entry))
    return whole, last


def _normal(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower().removeprefix("config.")


def advice(path: Sequence[str | int], value: object) -> list[str]:
    """Explains an unknown key that is a setting of another project.

    Args:
        path: where the unknown key stands in the recipe.
        value: what it was set to; a mapping is searched for names such as ``sample.noise_level``.

    Returns:
        One sentence for each setting that was recognised.
    """
    whole, _ = _index()
    found = []
    for name in _leaves(".".join(map(str, path)), value):
        match = whole.get(_normal(name))
        if match is not None:
            project, entry = match
            found.append(f"{name} of {project.title} {entry.advice}")
    return found


def similar(key: str) -> str | None:
    """Explains a key that matches only the last part of another project's setting; None if none does."""
    _, last = _index()
    match = last.get(_normal(key))
    return f"{match[1].name} of {match[0].title} {match[1].advice}" if match is not None else None


def _leaves(prefix: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    else:
        yield prefix


def ineffective_variables(environment: Mapping[str, str]) -> list[str]:
    """Explains variables of Euphonium's script that are set in the environment, where they have no effect here.

    Only upper-case names are checked: short lower-case ones such as ``lr`` may belong to any program.
    """
    return [
        f"{entry.name}={environment[entry.name]} {entry.advice}"
        for entry in projects()["euphonium"].names
        if entry.name.isupper() and entry.name in environment
    ]
